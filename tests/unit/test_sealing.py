"""Which steps are sealed when: together where reports wait, ahead where nothing can be learned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from controller.config import RunConfig
from controller.ledger_schema import Kind, plan_of
from protos.types import Step
from tests.fakes_controller import ScriptedPolicy, bench, make_report, small_run


def _alternating(step: Step) -> Sequence[float]:
    return (0.6, 0.2, 0.2) if step % 2 else (0.1, 0.1, 0.8)


def _scheduled(tmp_path: Path) -> RunConfig:
    points = [
        {"step": 0, "mixture": {"web": 0.5, "code": 0.25, "books": 0.25}},
        {"step": 37, "mixture": {"web": 0.25, "code": 0.25, "books": 0.5}},
    ]
    return small_run(tmp_path, steps=1000, policy={"name": "schedule", "points": points})


def test_steps_whose_reports_wait_are_committed_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path, control={"lag": 8})
        with bench(config, policy=ScriptedPolicy(_alternating)) as controller:
            await controller.join_all(1)
            for step in range(8):
                await controller.service.report(make_report(controller.spec, step=step))
            assert await controller.loop.advance()
            assert not await controller.loop.advance()
            assert controller.state.observed_through == 7
            assert [row.step for row in controller.ledger.rows(Kind.STEP)] == list(range(8))
            assert [row.step for row in controller.ledger.rows(Kind.SEAL)] == [7, 15]
            plans = [plan_of(row) for row in controller.ledger.rows(Kind.PLAN)]
            assert [plan.first_step for plan in plans] == [0, *range(8, 16)]
            for plan in plans[1:]:
                assert plan.mixture.shares == pytest.approx(_alternating(plan.first_step))

    asyncio.run(scenario())


def test_a_learning_policy_is_never_sealed_further_ahead_than_the_lag(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(_alternating)) as controller:
            await controller.join_all(1)
            for step in range(20):
                await controller.report_step(step, step_s=0.001)
                assert controller.state.sealed_through == step + 2

    asyncio.run(scenario())


def test_what_is_known_beforehand_is_sealed_a_twentieth_of_a_second_ahead(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(_scheduled(tmp_path)) as controller:
            await controller.join_all(1)
            await controller.report_step(0, step_s=0.2)
            assert controller.state.sealed_through == 2
            for step in range(1, 21):
                await controller.report_step(step, step_s=0.002)
            assert controller.state.sealed_through == 20 + 25
            # Each step has the mixture that was planned for it all the same.
            assert [plan.first_step for plan in controller.plans] == [0, 37]
            # Where steps get longer no more is sealed until the ranks have caught up.
            for step in range(21, 41):
                await controller.report_step(step, step_s=0.2)
            assert controller.state.sealed_through == 20 + 25

    asyncio.run(scenario())


def test_an_operator_is_obeyed_by_the_first_step_that_is_not_sealed(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(_scheduled(tmp_path)) as controller:
            await controller.join_all(1)
            for step in range(40):
                await controller.report_step(step, step_s=0.002)
            sealed = controller.state.sealed_through
            assert sealed == 39 + 25
            first = await controller.service.set_mixture({"books": 1.0})
            assert first == sealed + 1
            await controller.report_step(40, step_s=0.002)
            assert controller.state.newest_plan.first_step == first
            assert controller.state.newest_plan.mixture.shares == (0.0, 0.0, 1.0)
            await controller.service.resume()
            await controller.report_step(41, step_s=0.002)
            assert controller.state.newest_plan.mixture.shares == (0.25, 0.25, 0.5)

    asyncio.run(scenario())


def test_a_cap_on_epochs_needs_the_places_of_the_ranks_and_so_the_lag(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path, guard={"max_epochs": 3})) as controller:
            await controller.join_all(1)
            for step in range(5):
                await controller.report_step(step, step_s=0.001)
            assert controller.state.sealed_through == 6

    asyncio.run(scenario())


def test_a_run_is_not_sealed_far_beyond_its_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path, steps=10)) as controller:
            await controller.join_all(1)
            for step in range(10):
                await controller.report_step(step, step_s=0.001)
                assert controller.state.sealed_through == max(9, step + 2)

    asyncio.run(scenario())
