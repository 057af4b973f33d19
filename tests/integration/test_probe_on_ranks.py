"""The probe under DDP, FSDP2 and tensor parallelism, against autograd on a plain model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.fakes_model import TinyModel, domain_gradients, summed_loss
from tests.probe_ranks import CASES, NUM_DOMAINS, Case, batches_of, start_model
from trainer_client.layers import norm_layers, probe_layers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

_ROOT = Path(__file__).parent.parent.parent
_ROUNDING = {"ddp autocast": 0.05, "fsdp bf16": 0.05}
"""What bfloat16 makes of it, in parts of the largest entry."""

Parts = list[dict[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Run all cases on four ranks, once."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.probe_ranks", str(folder)],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(4)]


def _expected(case: Case) -> tuple[NDArray[np.float64], TinyModel, TinyModel]:
    """Return the alignment by autograd alone, and a plain model before and after the step."""
    model, after = start_model(), start_model()
    num_ranks = 2 if case.tensor_parallel else 4
    batches = [batch for rank in range(num_ranks) for batch in batches_of(rank)]
    weights = [layer.weight for layer in probe_layers(model, case.spec).values()]
    rows = domain_gradients(model, batches, weights, NUM_DOMAINS).double()  # type: ignore[arg-type]
    for batch in batches:
        summed_loss(after, batch).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in after.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1 / num_ranks)
    return (rows @ rows.T).numpy(), model, after


@pytest.mark.parametrize("name", CASES)
def test_the_alignment_is_that_of_exact_gradients(name: str, parts: Parts) -> None:
    expected, _, _ = _expected(CASES[name])
    reporting = [part for part in parts if part[f"{name}/reports"]]
    assert len(reporting) == (2 if CASES[name].tensor_parallel else 4)
    assert sum(float(part[f"{name}/share"]) for part in reporting) == pytest.approx(1.0)
    found = np.sum([part[f"{name}/part"] for part in reporting], axis=0)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=_ROUNDING.get(name, 1e-5) * largest)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor parallel fsdp"])
def test_norms_of_spread_weights_are_those_of_whole_ones(name: str, parts: Parts) -> None:
    _, before, after = _expected(CASES[name])
    layers = list(zip(norm_layers(before), norm_layers(after), strict=True))
    weights = [new.weight.norm().item() for _, new in layers]
    moves = [(new.weight - old.weight).norm().item() for old, new in layers]
    for part in parts:
        np.testing.assert_allclose(part[f"{name}/norms"][0], weights, rtol=1e-4)
        np.testing.assert_allclose(part[f"{name}/norms"][1], moves, rtol=1e-3)
        np.testing.assert_array_equal(part[f"{name}/norms"], parts[0][f"{name}/norms"])


def test_a_layer_whose_output_is_spread_over_tokens_is_refused(parts: Parts) -> None:
    for part in parts:
        assert "layer blocks.0.down is parallel over" in str(part["refusal"])
        assert "name other layers (probe.layers)" in str(part["refusal"])
