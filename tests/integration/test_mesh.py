"""Four ranks on a 2 x 2 mesh: two of them pull, their tensor-parallel peers get the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from tests.fakes_trainer import FakeRun, cursor_before, make_spec, sequence
from trainer_client.peers import places

_ROOT = Path(__file__).parent.parent.parent


def _run(address: str, folder: Path) -> list[dict[str, Any]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.mesh_ranks", address, str(folder)],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_peers_see_the_rows_of_their_leader_and_its_error_when_data_ends(tmp_path: Path) -> None:
    spec = make_spec(
        num_steps=5,
        vocab_size=500,
        data_timeout_s=3.0,
        probe=ProbeSpec(sketch_rows=4, sketch_columns=4, layers=("blocks.*",)),
    )
    with FakeRun(spec).serving() as run:
        run.workers[1].held_step = 3  # of the second data-parallel rank's lanes
        ranks = _run(run.address, tmp_path)
        requests = sorted((request.rank, request.world_size) for request in run.controller.requests)
        reports = list(run.controller.reports)
    assert requests == [(0, 2), (1, 2)]
    assert [rank["place"] for rank in ranks] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    for leader, peer in ((0, 1), (2, 3)):
        assert ranks[leader]["seen"] == ranks[peer]["seen"]
        assert ranks[leader]["state"] == ranks[peer]["state"]
        assert ranks[leader]["generation"] == ranks[peer]["generation"]
    for data_rank, rank in enumerate(ranks[::2]):
        slots = range(data_rank * 6, data_rank * 6 + 6)
        steps = {row[0] for row in rank["seen"]}
        assert [row[:2] for row in rank["seen"]] == [
            [s, slot] for s in sorted(steps) for slot in slots
        ]
        for step, slot, *tokens in rank["seen"]:
            assert tokens == sequence(spec, step, slot)[:-1].tolist()
    assert ranks[2]["state"]["step"] == 3
    assert ranks[3]["state"]["cursors"]["3"] == cursor_before(spec, 3, 3).tolist()
    assert "NotReady: step 3 did not come to rank 1 within 3 s" in ranks[2]["error"]
    assert ranks[3]["error"] == ranks[2]["error"] + " (told by rank 2)"
    assert max(rank["error_after_s"] for rank in ranks[2:]) < 20
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        "received.rank0.jsonl",
        "received.rank1.jsonl",
    ]
    by_step = sorted((report.step, report.rank) for report in reports if report.step < 3)
    assert by_step == [(step, rank) for step in range(3) for rank in range(2)]
    for report in reports:
        if report.step < 3:
            assert report.alignment_part is not None
            assert report.alignment_share == pytest.approx(0.5)
            assert np.isfinite(report.alignment_part).all()


class _Mesh(SimpleNamespace):
    """The arithmetic of a DeviceMesh, without processes."""

    def get_coordinate(self) -> list[int]:
        return [int(axis) for axis in (self.mesh == self.rank).nonzero()[0]]


@pytest.mark.parametrize(
    ("names", "axes", "sharing", "group"),
    [
        (("pp", "dp", "tp"), None, [2, 3, 6, 7], [0, 2]),
        (("dp_replicate", "dp_shard", "tp"), None, [2, 3], [0, 2, 4, 6]),
        (("a", "b", "c"), ("b", "c"), [2, 6], [0, 1, 2, 3]),
    ],
)
def test_a_mesh_says_who_shares_rows(
    names: tuple[str, ...], axes: tuple[str, ...] | None, sharing: list[int], group: list[int]
) -> None:
    mesh = _Mesh(mesh=torch.arange(8).view(2, 2, 2), rank=2, mesh_dim_names=names)
    assert places(mesh, axes) == (sharing, group)


@pytest.mark.parametrize("names", [None, ("tp", "pp", "cp")])
def test_a_mesh_without_data_axes_is_refused(names: tuple[str, ...] | None) -> None:
    mesh = _Mesh(mesh=torch.arange(8).view(2, 2, 2), rank=2, mesh_dim_names=names)
    with pytest.raises(ConfigError, match=r"pass the whole mesh and data_axes"):
        places(mesh, None)
