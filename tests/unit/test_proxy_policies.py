"""`doremi`, `doge` and `pike` against their equations, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.observation import StepObservation
from controller.policy import artefact
from controller.policy.doge import DogePolicy
from controller.policy.doremi import DoremiPolicy
from controller.policy.pike import PikePolicy, moments
from controller.policy.replay_mean import mean_shares
from controller.policy.settings_of_rivals import DogeConfig, DoremiConfig, PikeConfig
from protos.errors import ConfigError
from protos.types import Step
from tests.fakes_policy import make_context

TOKENS = np.array([100, 200, 50])


def seen(step: int = 0, **fields: Any) -> StepObservation:
    values: dict[str, Any] = {
        "step": Step(step),
        "num_steps": 100,
        "planned": np.full(3, 1 / 3),
        "sequences": TOKENS // 10,
        "tokens": TOKENS,
        "loss_sum": 2.0 * TOKENS,
        "alignment": None,
        "weight_norms": np.zeros(0),
        "update_norms": np.zeros(0),
    }
    return StepObservation(**{**values, **fields})


def test_doremi_by_hand_over_two_steps() -> None:
    policy = DoremiPolicy(DoremiConfig(learning_rate=0.5, smoothing=0.1), make_context())
    excess = np.array([0.2, 0.0, 1.0])
    policy.observe(seen(excess_sum=excess * TOKENS))
    weights = np.exp(0.5 * excess) / 3
    first = 0.9 * weights / weights.sum() + 0.1 / 3
    assert policy.propose(Step(2)) == pytest.approx(first)

    # Of the second domain nothing came: its excess stays.
    tokens = np.array([100, 0, 50])
    policy.observe(
        seen(1, tokens=tokens, loss_sum=2.0 * tokens, excess_sum=np.array([60.0, 0.0, 5.0]))
    )
    weights = first * np.exp(0.5 * np.array([0.6, 0.0, 0.1]))
    second = 0.9 * weights / weights.sum() + 0.1 / 3
    assert policy.propose(Step(3)) == pytest.approx(second)
    final = policy.state().values["final"]
    assert list(final) == ["domain-0", "domain-1", "domain-2"]
    assert list(final.values()) == pytest.approx((first + second) / 2)


def test_a_domain_that_was_never_drawn_neither_gains_nor_loses() -> None:
    policy = DoremiPolicy(DoremiConfig(), make_context())
    tokens = np.array([100, 0, 100])
    policy.observe(
        seen(tokens=tokens, loss_sum=2.0 * tokens, excess_sum=np.array([100.0, 0.0, 20.0]))
    )
    shares = policy.propose(Step(2))
    assert shares[0] > shares[1] > shares[2]


def test_doremi_without_a_reference_says_what_to_do() -> None:
    policy = DoremiPolicy(DoremiConfig(), make_context())
    with pytest.raises(ConfigError, match=r"not every rank .* step 4: session.loss\(.*reference="):
        policy.observe(seen(4))
    assert "final" not in policy.state().values


@pytest.mark.parametrize("kind", ["doremi", "doge"])
def test_what_a_proxy_run_comes_to_can_be_replayed(kind: str, tmp_path: Path) -> None:
    context = make_context()
    policy: DoremiPolicy | DogePolicy
    if kind == "doremi":
        policy = DoremiPolicy(DoremiConfig(), context)
    else:
        policy = DogePolicy(DogeConfig(), context)
    path = tmp_path / "after-000000002-steps.safetensors"
    artefact.save(policy.state(), path)
    with pytest.raises(ConfigError, match="holds no final mixture"):
        mean_shares(path, context)
    gram = np.diag([1.0, 2.0, 3.0]) * np.outer(TOKENS, TOKENS)
    for step, value in enumerate((0.5, 0.1)):
        excess = np.array([value, 0.2, 0.0]) * TOKENS
        policy.observe(seen(step, excess_sum=excess, alignment=gram))
    artefact.save(policy.state(), path)
    final = policy.state().values["final"]
    assert mean_shares(path, context) == pytest.approx(list(final.values()))
    with pytest.raises(ConfigError, match="of other domains"):
        mean_shares(path, make_context(2))


def test_doge_by_hand_over_two_steps() -> None:
    config = DogeConfig(learning_rate=0.1, floor=0.01)
    policy = DogePolicy(config, make_context())
    gradients = np.array([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    gram = gradients @ gradients.T
    # s = g . sum of all / mean |g|, cut off at 0: the third domain's is negative.
    scores = np.array([3 * 2.0, 1.0, 0.0]) / (5 / 3)
    policy.observe(seen(alignment=gram * np.outer(TOKENS, TOKENS)))
    weights = np.exp(0.1 * scores)
    assert policy.propose(Step(2)) == pytest.approx(0.97 * weights / weights.sum() + 0.01)

    # Ten times as large: scores are cut off at 5.
    policy.observe(seen(1, alignment=100 * gram * np.outer(TOKENS, TOKENS)))
    weights = np.exp(0.1 * (scores + np.minimum(10 * scores, 5)))
    assert policy.propose(Step(3)) == pytest.approx(0.97 * weights / weights.sum() + 0.01)


def test_doge_without_the_own_term_is_the_text() -> None:
    policy = DogePolicy(DogeConfig(learning_rate=0.1, own_term=False, floor=0.0), make_context())
    gram = np.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    policy.observe(seen(alignment=gram * np.outer(TOKENS, TOKENS)))
    weights = np.exp(0.1 * np.array([1.0, 1.0, 0.0]))
    assert policy.propose(Step(2)) == pytest.approx(weights / weights.sum())


def measured(
    gradients: list[np.ndarray[Any, np.dtype[np.float64]]], *, length: int = 10
) -> StepObservation:
    """A step of sequences of `length` tokens; [sequences, size] mean gradients for each domain."""
    sums = np.array([length * rows.sum(axis=0) for rows in gradients])
    counts = np.array([len(rows) for rows in gradients])
    return seen(
        sequences=counts,
        tokens=counts * length,
        loss_sum=2.0 * counts * length,
        alignment=sums @ sums.T,
        part_square_norms=np.array([((length * rows) ** 2).sum() for rows in gradients]),
        num_parts=counts,
    )


def test_moments_are_those_of_the_sequences_gradients() -> None:
    rng = np.random.default_rng(0)
    gradients = [rng.normal(0.5, 1, (size, 4)) for size in (3, 8, 1)]
    square, variance, known = moments(measured(gradients))
    assert known.tolist() == [True, True, False]
    for index in range(2):
        rows = gradients[index]
        wanted = rows.var(axis=0, ddof=1).sum()
        assert variance[index] == pytest.approx(wanted)
        mean = (rows.mean(axis=0) ** 2).sum() - wanted / len(rows)
        assert square[index] == pytest.approx(mean)


def test_moments_are_unbiased() -> None:
    rng = np.random.default_rng(1)
    mean, deviation = np.array([0.6, -0.3, 0.2]), 0.8
    exact_square, exact_variance = (mean**2).sum(), 3 * deviation**2
    found = []
    for _ in range(4_000):
        rows = mean + rng.normal(0, deviation, (6, 3))
        filler = rng.normal(0, 1, (2, 3))
        square, variance, _ = moments(measured([rows, filler, filler]))
        found.append((square[0], variance[0]))
    squares, variances = np.array(found).T
    assert variances.mean() == pytest.approx(exact_variance, rel=0.02)
    assert squares.mean() == pytest.approx(exact_square, rel=0.04)


def test_pike_by_hand() -> None:
    config = PikeConfig(update_steps=2, zeta1=0.2, zeta2=3.0, floor=0.01, initial="uniform")
    context = make_context(global_sequences=8)
    policy = PikePolicy(config, context)
    steps = []
    for spread in (0.5, 0.3):
        gradients = [
            np.array([[1.0 + spread, 0.0], [1.0 - spread, 0.0]]),
            np.array([[0.0, 2.0], [0.0, 2.0]]),
            np.array([[1.0, 1.0]]),
        ]
        steps.append(measured(gradients))
    policy.observe(steps[0])
    assert policy.propose(Step(2)) == pytest.approx([1 / 3] * 3)
    policy.observe(steps[1])
    variance = np.array([(2 * 0.5**2 + 2 * 0.3**2) / 2, 0.0])
    square = np.array([1.0 - variance[0] / 2, 4.0])
    scale = square.mean()
    exponent = 0.2 * square / scale - 3.0 / 16 * variance / scale
    # The third domain had one sequence a step: it keeps its share against the mean.
    exponent = np.append(exponent, exponent.mean())
    weights = (0.97 / 3 + 0.01) * np.exp(exponent)
    assert policy.propose(Step(3)) == pytest.approx(0.97 * weights / weights.sum() + 0.01)


def test_pike_prefers_the_larger_gradient_and_the_smaller_noise() -> None:
    rng = np.random.default_rng(2)
    policy = PikePolicy(PikeConfig(update_steps=5), make_context(global_sequences=48))
    for step in range(100):
        gradients = [
            np.array([1.0, 0.0]) + rng.normal(0, 0.1, (16, 2)),
            np.array([0.3, 0.0]) + rng.normal(0, 0.1, (16, 2)),
            np.array([1.0, 0.0]) + rng.normal(0, 8.0, (16, 2)),
        ]
        policy.observe(replace(measured(gradients), step=Step(step)))
    large, small, noisy = policy.propose(Step(100))
    assert large > 2 * small
    assert large > 2 * noisy


def test_pike_waits_for_what_is_not_measured() -> None:
    policy = PikePolicy(PikeConfig(update_steps=1), make_context())
    before = policy.propose(Step(0))
    policy.observe(seen())
    assert policy.propose(Step(2)) == before
    assert math.isclose(sum(before), 1)
