"""How well the sketch ranks the domains, on a small model trained on real text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.utils import clip_grad_norm_

from deploy.examples.models import make_model
from protos.spec import ProbeSpec
from protos.types import Step
from tests.text_domains import text_batch, text_domains
from trainer_client import GradientProbe
from trainer_client.loss import token_losses

_LENGTH = 64
_TRAINED_STEPS = 60
_MEASURED_STEPS = 30


def _rewards(probe: GradientProbe, step: Step) -> NDArray[np.float64]:
    """Return W_i, the sum over the other domains j of H_ij."""
    measured = probe.finish(step, loss_scale=1.0)
    assert measured.alignment is not None
    alignment = measured.alignment.wait(timeout_s=10)
    return np.asarray(alignment.sum(axis=1) - np.diag(alignment))


def _rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@pytest.mark.long
def test_the_sketch_ranks_the_domains_as_exact_gradients_do() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    domains, rng = text_domains(), np.random.default_rng(0)
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
        batch = text_batch(domains, step, rng, per_domain=4, length=_LENGTH)
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
