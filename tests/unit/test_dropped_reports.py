"""What the decision loop does with reports that a rank has dropped: it does not wait for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from protos.types import Step
from tests.fakes_controller import Clock, ScriptedPolicy, bench, make_report, small_run


def _policy() -> ScriptedPolicy:
    return ScriptedPolicy(lambda step: (0.2, 0.3, 0.5))


def test_a_step_that_every_rank_has_passed_is_closed_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = _policy()
        with bench(small_run(tmp_path, control={"lag": 8}), policy=policy, now=Clock()) as at:
            await at.join_all(2)
            # Rank 0 dropped step 0; no clock moves, so no grace time can be over.
            await at.service.report(make_report(at.spec, rank=1, world_size=2, step=0))
            await at.service.report(make_report(at.spec, rank=1, world_size=2, step=1))
            await at.settle()
            assert at.state.observed_through == -1
            await at.service.report(make_report(at.spec, rank=0, world_size=2, step=1))
            await at.settle()
            assert at.state.observed_through == 1
            assert [each.num_missing_ranks for each in policy.observed] == [1, 0]

    asyncio.run(scenario())


def test_steps_that_every_rank_dropped_are_passed_over_under_the_plan_in_force(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        policy = _policy()
        with bench(small_run(tmp_path, control={"lag": 8}), policy=policy, now=Clock()) as at:
            await at.join_all(1)
            await at.report_step(5)
            assert at.state.sealed_through == 5 + 8
            assert [each.step for each in policy.observed] == [Step(5)]
            assert (await at.service.status()).missing_reports == 5

    asyncio.run(scenario())
