"""The example trainer's models and learning rate."""

from __future__ import annotations

import pytest
import torch

from deploy.examples.models import make_model
from deploy.examples.train import learning_rate
from protos.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "millions"),
    [("14m", 14.07), ("70m", 70.43), ("160m", 162.32), ("410m", 405.33), ("1b", 1011.78)],
)
def test_models_have_pythias_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = make_model(name, 50_304, 2048)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    assert num_parameters / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_seed_gives_the_same_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        weights.append(torch.cat([w.flatten() for w in make_model("tiny", 64, 16).parameters()]))
    assert torch.equal(weights[0], weights[1])


def test_a_model_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="no model '7b': choose one of tiny, 14m"):
        make_model("7b", 64, 16)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, num_steps=100, highest=1.0) for step in range(101)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(later <= earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))
    assert rates[100] == pytest.approx(0.1)
