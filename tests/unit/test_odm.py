from __future__ import annotations

import math

import numpy as np
import pytest

from controller.observation import StepObservation
from controller.policy.config import OdmConfig, OdmPaperConfig
from controller.policy.odm import OdmPolicy, exploration_floor
from protos.types import Step
from tests.fakes_policy import make_context


def seen(step: int, losses: list[float], tokens: list[int]) -> StepObservation:
    return StepObservation(
        step=Step(step),
        num_steps=100,
        planned=np.array([0.5, 0.3, 0.2]),
        sequences=np.array(tokens),
        tokens=np.array(tokens),
        loss_sum=np.array(losses) * np.array(tokens),
        alignment=None,
        weight_norms=np.zeros(0),
        update_norms=np.zeros(0),
    )


def test_the_floor_falls_with_the_root_of_time_from_an_even_mixture() -> None:
    assert exploration_floor(1, 3) == 1 / 3
    assert exploration_floor(100, 3) == math.sqrt(math.log(3) / 300)
    assert exploration_floor(1, 1) == 0.0
    # As published for 22 domains: 0.18 and 0.04 in all at steps 2,000 and 41,667.
    assert 22 * exploration_floor(2_000, 22) == pytest.approx(0.184, abs=1e-3)
    assert 22 * exploration_floor(41_667, 22) == pytest.approx(0.040, abs=1e-3)


def test_odm_by_hand_over_two_steps() -> None:
    policy = OdmPolicy(OdmConfig(warmup_steps=10, smoothing=0.5), make_context())
    policy.observe(seen(9, [9.0, 9.0, 9.0], [1, 1, 1]))
    assert policy.phase == "warm-up"
    assert policy.propose(Step(12)) == pytest.approx((1 / 6, 2 / 6, 3 / 6))

    policy.observe(seen(10, [1.0, 2.0, 3.0], [4, 4, 4]))
    powers = [math.exp(loss) / 2 for loss in (1, 2, 3)]
    eps = math.sqrt(math.log(3) / (3 * 11))
    assert policy.phase == "acting"
    assert policy.propose(Step(13)) == pytest.approx(
        [(1 - 3 * eps) * power / sum(powers) + eps for power in powers]
    )

    policy.observe(seen(11, [1.0, 99.0, 1.0], [4, 0, 4]))  # nothing of the second domain
    powers = [powers[0] / 2 + math.e / 2, powers[1], powers[2] / 2 + math.e / 2]
    eps = math.sqrt(math.log(3) / (3 * 12))
    assert policy.propose(Step(14)) == pytest.approx(
        [(1 - 3 * eps) * power / sum(powers) + eps for power in powers]
    )


def test_a_domain_never_drawn_stays_at_the_floor() -> None:
    policy = OdmPolicy(OdmConfig(warmup_steps=0), make_context())
    policy.observe(seen(50, [1.0, 0.0, 1.0], [4, 0, 4]))
    assert policy.propose(Step(52))[1] == exploration_floor(51, 3)


def test_odm_paper_by_hand() -> None:
    policy = OdmPolicy(OdmPaperConfig(warmup_steps=0, smoothing=0.5), make_context())
    policy.observe(seen(20, [1.0, 2.0, 3.0], [4, 4, 4]))
    rewards = [0.5 * 1 / 0.5, 0.5 * 2 / 0.3, 0.5 * 3 / 0.2]
    eps = exploration_floor(21, 3)
    powers = [math.exp(reward / 3) for reward in rewards]  # the floor before the first is 1 / 3
    assert policy.propose(Step(22)) == pytest.approx(
        [(1 - 3 * eps) * power / sum(powers) + eps for power in powers]
    )


def test_a_loss_beyond_all_measure_stays_finite() -> None:
    policy = OdmPolicy(OdmConfig(warmup_steps=0), make_context())
    policy.observe(seen(5, [1e6, 1.0, 1.0], [4, 4, 4]))
    assert np.isfinite(policy.propose(Step(7))).all()


def test_the_warm_up_is_a_fiftieth_of_the_run_unless_set() -> None:
    policy = OdmPolicy(OdmConfig(), make_context(num_steps=100))
    policy.observe(seen(1, [1.0, 2.0, 3.0], [4, 4, 4]))
    assert policy.phase == "warm-up"
    policy.observe(seen(2, [1.0, 2.0, 3.0], [4, 4, 4]))
    assert policy.phase == "acting"
