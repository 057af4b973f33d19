"""The environments themselves: what is called the best mixture must be it."""

from __future__ import annotations

import numpy as np
import pytest

from controller.policy.config import StaticConfig, UniformConfig
from tests.learning import worlds
from tests.learning.contenders import play
from tests.learning.environments import Environment, bounds


def fixed(shares: list[float]) -> StaticConfig:
    return StaticConfig(mixture={f"domain-{index}": share for index, share in enumerate(shares)})


@pytest.mark.parametrize("make", worlds.EVERYWHERE, ids=lambda make: str(make.__name__))
def test_what_is_expected_is_what_runs_give_on_average(make: object) -> None:
    environment: Environment = make()  # type: ignore[operator]
    scores = [play(UniformConfig(), environment, seed).score for seed in range(8)]
    uniform, best = bounds(environment)
    noise = np.std(scores, ddof=1) / np.sqrt(len(scores))
    assert np.mean(scores) == pytest.approx(uniform, abs=4 * noise + 0.01 * abs(uniform))
    assert best <= uniform + 1e-9


@pytest.mark.parametrize("make", [worlds.bandit, worlds.helper, worlds.aligned])
def test_a_run_under_the_best_mixture_is_as_good_as_it_is_said_to_be(make: object) -> None:
    environment: Environment = make()  # type: ignore[operator]
    mixture = environment.best()[0].tolist()
    uniform, best = bounds(environment)
    scores = [play(fixed(mixture), environment, seed).score for seed in range(6)]
    assert np.mean(scores) == pytest.approx(best, abs=0.1 * (uniform - best))


def test_the_best_mixtures_that_can_be_seen_are_found() -> None:
    assert worlds.bandit().best()[0].argmax() == 0
    assert worlds.bandit().best()[0].max() == pytest.approx(1 - 5 * 0.005, abs=0.01)
    assert [shares.argmax() for shares in worlds.drifting().best()] == [0, 1]
    assert worlds.helper().best()[0].argmax() == 0


def test_the_best_mixture_is_better_than_any_other() -> None:
    rng = np.random.default_rng(0)
    for make in (worlds.aligned, worlds.strangers):
        environment = make()
        best = environment.expected(environment.best())
        others = [
            environment.expected(0.97 * rng.dirichlet(np.ones(6), 1) + 0.005) for _ in range(60)
        ]
        assert best < min(others)


def test_where_mixing_does_not_matter_all_mixtures_are_alike() -> None:
    environment = worlds.neutral()
    rng = np.random.default_rng(0)
    scores = [environment.expected(rng.dirichlet(np.ones(6), 1)) for _ in range(20)]
    assert np.ptp(scores) < 1e-9 + 1e-3 * abs(np.mean(scores))


def test_the_same_seed_gives_the_same_run() -> None:
    environment = worlds.helper()
    one, other = (play(UniformConfig(), environment, 3).score for _ in range(2))
    assert one == other
    assert play(UniformConfig(), environment, 4).score != one
