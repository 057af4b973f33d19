"""Several real ranks: their sketches add up to one process's, and the example trainer resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protos.spec import ProbeSpec
from tests.fakes_model import TinyModel, make_batches, summed_loss
from tests.fakes_trainer import FakeRun, make_spec
from trainer_client import GradientProbe

_ROOT = Path(__file__).parent.parent.parent
_MIXES = [[[0, 1, 2, 3], [2, 0]], [[3, 3, 1, 0], [1, 2]]]
"""A rank, a micro-batch, a sequence's domain."""


def _alignment(
    spec: ProbeSpec, ranks: range, *, world_size: int
) -> tuple[NDArray[np.float64], float]:
    torch.manual_seed(0)
    model = TinyModel()
    probe = GradientProbe(model, spec=spec, num_domains=4, world_size=world_size)
    batches = [batch for rank in ranks for batch in make_batches(_MIXES[rank], seed=rank)]
    for index, batch in enumerate(batches):
        if index == 0 or not batch.first_of_step:
            probe.begin(batch)
        else:  # another rank's first, which must not begin the step anew
            probe._domain_ids = batch.domain_ids
        summed_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    measured = probe.finish(batches[0].step, loss_scale=1.0).alignment
    probe.close()
    assert measured is not None
    return measured.wait(timeout_s=20), measured.share


SPECS = {
    # 3 layers of 7 x 5 coordinates do not divide by 2: one rank's part is padded.
    "sketch": ProbeSpec(sketch_rows=7, sketch_columns=5),
    "exact": ProbeSpec(mode="exact"),
}


def rank_main(folder: Path) -> None:
    """Run in each of the ranks: write this rank's parts to a file."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name, spec in SPECS.items():
        found[name], share = _alignment(spec, range(rank, rank + 1), world_size=2)
        found[f"{name}_share"] = np.array(share)
    np.savez(folder / f"rank{rank}.npz", **found)  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def _torchrun(*arguments: str, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *arguments,
        ],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_ranks_parts_add_up_to_what_one_process_measures(tmp_path: Path) -> None:
    _torchrun("-m", "tests.integration.test_ranks_together", str(tmp_path))
    parts = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(2)]
    for name, spec in SPECS.items():
        whole, share = _alignment(spec, range(2), world_size=1)
        assert share == 1.0
        assert sum(float(part[f"{name}_share"]) for part in parts) == pytest.approx(1.0)
        added = parts[0][name] + parts[1][name]
        np.testing.assert_allclose(added, whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max())
        assert not np.allclose(parts[0][name], whole, rtol=0.05)


def _received(folder: Path) -> list[tuple[int, int, str]]:
    """Return step, slot and digest of every sequence, the newest generation's, in order."""
    newest: dict[tuple[int, int], tuple[int, str]] = {}
    for path in folder.glob("received.rank*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            key = (entry["step"], entry["slot"])
            newest[key] = max(newest.get(key, (0, "")), (entry["generation"], entry["sha256"]))
    return [(*key, digest) for key, (_, digest) in sorted(newest.items())]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_example_trainer_stops_resumes_and_reports(tmp_path: Path) -> None:
    spec = make_spec(num_steps=6, sequence_length=16, probe=ProbeSpec(), vocab_size=500)
    with FakeRun(spec).serving() as run:
        arguments = [
            *("deploy/examples/train.py", "--controller", run.address, "--micro-batch", "4"),
            *("--checkpoint-dir", str(tmp_path / "checkpoints"), "--checkpoint-every", "2"),
            *("--delivery-log", str(tmp_path / "log"), "--resume"),
        ]
        env = {"PYTHONPATH": str(_ROOT)}
        _torchrun(*arguments, "--until", "3", env=env)
        assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
            "step-00000002",
            "step-00000003",
        ]
        run.controller.generation = 2
        _torchrun(*arguments, env=env)
        received = _received(tmp_path / "log")
        assert [entry[:2] for entry in received] == [
            (step, slot) for step in range(6) for slot in range(12)
        ]
        reports = run.controller.reports
        assert sorted((report.step, report.rank) for report in reports) == [
            (step, rank) for step in range(6) for rank in range(2)
        ]
        for report in reports:
            assert report.alignment_part is not None
            assert report.alignment_share == pytest.approx(0.5)
            assert np.isfinite(report.alignment_part).all()
            assert len(report.weight_norms) == len(report.update_norms) == 9
            assert min(report.update_norms) > 0
            assert report.tokens.sum() > 0
            assert report.probe_s > 0


@pytest.mark.slow
def test_the_example_trainer_without_a_controller_ends_with_one_sentence() -> None:
    single = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [
            *(sys.executable, "deploy/examples/train.py"),
            *("--controller", "127.0.0.1:1", "--timeout-s", "0.5"),
        ],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), **single},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "train.py: cannot reach the controller at 127.0.0.1:1 after 0.5 s: start it "
        "(headrace controller run.yaml) or check the address, the firewall and, with TLS, the "
        "certificates (no answer from 127.0.0.1:1: "
    )
    assert done.stderr.count("\n") == 1


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
