"""The figures by which one sees whether AC-ODM learns."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from controller.ledger_schema import Kind
from controller.policy.acodm.diagnostics import of_mixture, of_rewards
from controller.policy.acodm.moments import RunningMoments
from controller.policy.acodm.policy import AcodmPolicy
from controller.policy.config import AcodmConfig
from tests.fakes_controller import ACODM, STATIC, bench, small_run
from tests.fakes_policy import SimulatedRun, make_context

SMALL = AcodmConfig(initial="uniform", width=32, depth=2, batch_size=16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rewards_by_hand() -> None:
    scores = RunningMoments(2, horizon=100)
    for one, other in ((1, 10), (3, 14)):
        scores.update(np.array([one, other]))
    # Means 2 and 12, variances 1 and 4.
    assert of_rewards(scores) == pytest.approx(
        {"reward_mean": 7, "reward_variance": 2.5, "reward_snr": 5 / math.sqrt(2.5)}
    )


def test_without_noise_there_is_no_ratio_to_it() -> None:
    assert "reward_snr" not in of_rewards(RunningMoments(2, horizon=100))


def test_the_mixture_by_hand() -> None:
    figures = of_mixture(np.array([0.5, 0.5, 0.0]), np.array([0.2, 0.3, 0.5]))
    assert figures == pytest.approx({"actor_entropy": math.log(2), "distance_to_initial": 0.5})


def test_a_clear_reward_is_told_from_noise_and_the_critic_foresees_it() -> None:
    context = make_context(4, num_steps=120)
    figures = []
    for good in ((0, 1), ()):
        policy = AcodmPolicy(SMALL, context)
        SimulatedRun(context=context, good=good).play(policy, range(120))
        figures.append(policy.diagnostics())
    one, other = figures
    assert all(math.isfinite(figure) for figure in (one | other).values())
    assert one["reward_snr"] > 2 * other["reward_snr"]
    assert one["critic_explained_variance"] > max(0.5, other["critic_explained_variance"])
    assert one["distance_to_initial"] > other["distance_to_initial"]


@pytest.mark.parametrize("policy", [ACODM, STATIC], ids=["acodm", "static"])
def test_the_ledger_has_what_the_policy_says_of_itself(tmp_path: Path, policy: object) -> None:
    async def scenario() -> list[dict[str, float]]:
        with bench(small_run(tmp_path, policy=policy)) as controller:
            await controller.join_all(1)
            for step in range(10):
                await controller.report_step(step)
            return [row.body["diagnostics"] for row in controller.ledger.rows(Kind.STEP)]

    figures = asyncio.run(scenario())
    assert len(figures) == 10
    if policy is STATIC:
        assert figures[-1] == {}
    else:
        assert figures[-1].keys() >= {
            "reward_mean",
            "reward_variance",
            "reward_snr",
            "critic_explained_variance",
            "actor_entropy",
            "distance_to_initial",
        }
