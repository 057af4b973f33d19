"""A controller that was restarted goes on as if it had never stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from controller.app import bring_up
from controller.config import RunConfig
from controller.history import read_history
from controller.ledger_schema import CARRY_EVERY, Kind, plan_of
from protos.planbook import PlanBook
from protos.types import Plan, Step
from tests.fakes_controller import (
    ACODM,
    ODM,
    STATIC,
    Bench,
    ScriptedPolicy,
    bench,
    make_beat,
    small_run,
)

NUM_STEPS = 24
WORLD_SIZE = 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


async def _replay_policy(controller: Bench, config: RunConfig) -> None:
    history = read_history(controller.ledger, controller.spec)
    await bring_up(controller.runner, history, controller.ledger, controller.ledger_thread)


async def _train(config: RunConfig, stops: set[int]) -> tuple[Plan, ...]:
    """Train all steps, with the controller started anew before each step of `stops`."""
    step = 0
    while step < NUM_STEPS:
        with bench(config) as controller:
            await _replay_policy(controller, config)
            if controller.state.membership is None:
                await controller.join_all(WORLD_SIZE)
            else:
                controller.workers.told_plans("worker-0")
                for _ in range(2):
                    controller.workers.beat(make_beat())
            while step < NUM_STEPS:
                await controller.report_step(step, world_size=WORLD_SIZE)
                step += 1
                if step in stops:
                    break
            await controller.loop.finish_saving()
            plans = tuple(plan_of(row) for row in controller.ledger.rows(Kind.PLAN))
    return plans


@pytest.mark.parametrize("policy", [STATIC, ODM, ACODM], ids=["static", "odm", "acodm"])
def test_restarts_change_no_plan(tmp_path: Path, policy: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"policy": policy, "guard": {"time_budget_s": 30.0}}
    undisturbed = asyncio.run(_train(small_run(tmp_path / "a", **changes), set()))
    restarted = asyncio.run(_train(small_run(tmp_path / "b", **changes), {3, 4, 11, 17}))
    assert restarted == undisturbed
    assert len(undisturbed) == 1 if policy is STATIC else len(undisturbed) > NUM_STEPS // 2


def test_a_snapshot_that_is_gone_or_damaged_is_made_up_for_by_the_ledger(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"policy": ACODM, "guard": {"time_budget_s": 30.0}}
    undisturbed = asyncio.run(_train(small_run(tmp_path / "a", **changes), set()))
    config = small_run(tmp_path / "b", **changes)

    async def scenario() -> tuple[Plan, ...]:
        with bench(config) as controller:
            await controller.join_all(WORLD_SIZE)
            for step in range(21):
                await controller.report_step(step, world_size=WORLD_SIZE)
            await controller.loop.finish_saving()
        first, second = sorted(config.snapshots_path.iterdir())
        first.unlink()
        second.write_bytes(b"torn")
        with bench(config) as controller:
            await _replay_policy(controller, config)
            controller.workers.told_plans("worker-0")
            for _ in range(2):
                controller.workers.beat(make_beat())
            for step in range(21, NUM_STEPS):
                await controller.report_step(step, world_size=WORLD_SIZE)
            return tuple(plan_of(row) for row in controller.ledger.rows(Kind.PLAN))

    assert asyncio.run(scenario()) == undisturbed


def test_no_decision_is_made_before_workers_have_said_how_far_they_went_alone(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config, policy=ScriptedPolicy(lambda step: (1, 0, 0))) as controller:
            answer = await controller.join_all(1)
        policy = ScriptedPolicy(lambda step: (0, 0, 1))
        with bench(config, policy=policy) as controller:
            assert controller.state.generation == answer.generation
            await controller.report_step(0)
            assert controller.state.observed_through == -1
            controller.workers.told_plans("worker-0")
            alone = make_beat(generation=answer.generation, composed_through=3)
            for _ in range(2):
                controller.workers.beat(alone)
            await controller.settle()
            assert controller.state.sealed_through == 2
            await controller.report_step(1)
            await controller.report_step(2)
            # Steps 2 and 3 were composed with the plan of before.
            assert [plan.first_step for plan in controller.plans] == [0, 4]

    asyncio.run(scenario())


def test_workers_are_told_the_plans_they_need_wherever_the_controller_was_killed(
    tmp_path: Path,
) -> None:
    """Also where a snapshot of the carry lies between what is observed and what is sealed."""

    async def scenario() -> None:
        config = small_run(tmp_path, steps=1000, policy=ODM, control={"lag": 40})
        with bench(config) as controller:
            await controller.join_all(1)
        for step in range(CARRY_EVERY + 6):
            if step < CARRY_EVERY - 50:
                continue
            with bench(config) as controller:
                controller.workers.told_plans("worker-0")
                for _ in range(2):
                    controller.workers.beat(make_beat(generation=1))
                first = controller.state.observed_through + 1
                for missing in range(first, step + 1):
                    await controller.report_step(missing)
                assert controller.state.observed_through == step
            with bench(config) as controller:
                event, _ = controller.state.next_event(None)
                assert (event.reset, event.sealed_through) == (True, step + 40)
                book = PlanBook(global_sequences=config.batch.global_sequences)
                for plan in event.plans:
                    book.add(plan)
                assert book.plans[0].first_step == step + 1

    asyncio.run(scenario())


def test_the_carry_at_any_step_is_a_few_steps_away_in_the_ledger(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path, steps=1000)
        with bench(config) as controller:
            await controller.join_all(1)
            for step in range(2 * CARRY_EVERY + 10):
                await controller.report_step(step)
            book = controller.state.book
            expected = book.carry(Step(controller.state.sealed_through + 1))
        with bench(config) as controller:
            assert controller.plans[0].first_step == 2 * CARRY_EVERY
            sealed = controller.state.sealed_through
            assert controller.state.book.carry(Step(sealed + 1)).tolist() == expected.tolist()
            assert len(list(controller.ledger.rows(Kind.PLAN))) == 1

    asyncio.run(scenario())
