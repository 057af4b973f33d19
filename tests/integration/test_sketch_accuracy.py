"""How well the sketch ranks the domains, on a small model trained on real text."""

from __future__ import annotations

import ast
import contextlib
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.utils import clip_grad_norm_

from deploy.examples.models import make_model
from protos.spec import ProbeSpec
from protos.types import Step
from trainer_client import Batch, GradientProbe
from trainer_client.loss import token_losses

_LENGTH = 64
_PER_DOMAIN = 4
_TRAINED_STEPS = 60
_MEASURED_STEPS = 30
_DOMAIN_BYTES = 200_000


def _read(pattern: str) -> str:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob(pattern)):
        with contextlib.suppress(UnicodeDecodeError):
            found.append(path.read_text())
        if sum(map(len, found)) > _DOMAIN_BYTES:
            break
    return "\n".join(found)


def _docstrings() -> str:
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found.append(ast.get_docstring(node) or "")
        if sum(map(len, found)) > _DOMAIN_BYTES:
            break
    return "\n".join(found)


def _domains() -> list[NDArray[np.int64]]:
    """Return the bytes of eight kinds of text that any Python holds."""
    texts = [
        _read("asyncio/*.py"),
        _read("encodings/cp*.py"),
        _read("html/entities.py"),
        _read("email/*.py"),
        _read("unittest/*.py"),
        _docstrings(),
        "\n".join(pydoc_data.topics.topics.values()),
        "\n".join(f"{a} + {b} = {a + b}" for a in range(150) for b in range(60)),
    ]
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]


def _batch(domains: list[NDArray[np.int64]], step: int, rng: np.random.Generator) -> Batch:
    rows, ids = [], []
    for domain, text in enumerate(domains):
        for first in rng.integers(0, len(text) - _LENGTH - 1, _PER_DOMAIN):
            rows.append(text[first : first + _LENGTH + 1])
            ids.append(domain)
    tokens = torch.from_numpy(np.stack(rows))
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=torch.ones(len(ids), _LENGTH, dtype=torch.bool),
        domain_ids=torch.tensor(ids),
        step=Step(step),
        slots=range(len(ids)),
        first_of_step=True,
        last_of_step=True,
        plan_version=0,
        degraded=False,
    )


def _rewards(probe: GradientProbe, step: Step) -> NDArray[np.float64]:
    """Return W_i, the sum over the other domains j of H_ij."""
    measured = probe.finish(step, loss_scale=1.0)
    assert measured.alignment is not None
    alignment = measured.alignment.wait(timeout_s=10)
    return np.asarray(alignment.sum(axis=1) - np.diag(alignment))


def _rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@pytest.mark.slow
def test_the_sketch_ranks_the_domains_as_exact_gradients_do() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    domains, rng = _domains(), np.random.default_rng(0)
    model = make_model("tiny", 256, _LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    probes: list[GradientProbe] = []
    correlations = []
    for step in range(_TRAINED_STEPS + _MEASURED_STEPS):
        if step == _TRAINED_STEPS:
            probes = [
                GradientProbe(model, spec=ProbeSpec(mode=mode), num_domains=len(domains))
                for mode in ("exact", "sketch")
            ]
        batch = _batch(domains, step, rng)
        for probe in probes:
            probe.begin(batch)
        losses = token_losses(model(batch.tokens).logits, batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        if probes:
            exact, sketch = (_rewards(probe, batch.step) for probe in probes)
            correlations.append(_rank_correlation(exact, sketch))
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mean = float(np.mean(correlations))
    print(f"rank correlation of rewards, p = q = 64: {mean:.3f} (least {min(correlations):.3f})")
    assert mean >= 0.9
