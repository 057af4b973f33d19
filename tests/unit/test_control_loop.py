"""What the decision loop does with reports that come, come late, or never come."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from controller.ledger_schema import Kind, plan_of
from protos.errors import InvalidMessage, StaleGeneration
from tests.fakes_controller import (
    ODM,
    Clock,
    ScriptedPolicy,
    alternating,
    bench,
    make_beat,
    make_report,
    places_after,
    resume_at,
    small_run,
)


def test_a_generation_begins_with_lag_steps_sealed_under_the_plan_in_force(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            answer = await controller.join_all(2)
            assert answer.generation == 1
            assert answer.first_step == 0
            assert controller.state.sealed_through == 1
            assert [plan.first_step for plan in controller.plans] == [0]

    asyncio.run(scenario())


def test_a_report_of_step_s_decides_the_plan_of_step_s_plus_lag(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path, control={"lag": 3})
        with bench(config, policy=ScriptedPolicy(alternating)) as controller:
            await controller.join_all(1)
            for step in range(6):
                await controller.report_step(step)
                assert controller.state.sealed_through == step + 3
            assert [plan.first_step for plan in controller.plans] == [0, 3, 4, 5, 6, 7, 8]
            for plan in controller.plans[1:]:
                assert plan.mixture.shares == pytest.approx(alternating(plan.first_step))

    asyncio.run(scenario())


def test_a_plan_version_is_new_only_when_the_mixture_changes(tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(lambda step: (0.5, 0.25, 0.25))
        with bench(small_run(tmp_path), policy=policy) as controller:
            await controller.join_all(1)
            for step in range(4):
                await controller.report_step(step)
            assert [plan.version for plan in controller.plans] == [1, 2]
            assert controller.state.sealed_through == 5

    asyncio.run(scenario())


def test_a_decision_waits_for_all_ranks(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(2)
            await controller.service.report(make_report(controller.spec, rank=0, world_size=2))
            await controller.settle()
            assert controller.state.observed_through == -1
            await controller.service.report(make_report(controller.spec, rank=1, world_size=2))
            await controller.settle()
            assert controller.state.observed_through == 0

    asyncio.run(scenario())


def test_after_the_grace_time_a_decision_is_made_from_the_reports_that_are_there(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        clock, policy = Clock(), ScriptedPolicy(alternating)
        with bench(small_run(tmp_path), policy=policy, now=clock) as controller:
            await controller.join_all(2)
            await controller.service.report(make_report(controller.spec, rank=1, world_size=2))
            clock.now_s += 0.29
            await controller.settle()
            assert controller.state.sealed_through == 1
            clock.now_s += 0.02
            await controller.settle()
            assert controller.state.sealed_through == 2
            assert policy.observed[0].num_missing_ranks == 1
            assert (await controller.service.status()).missing_reports == 1
            late = make_report(controller.spec, rank=0, world_size=2)
            assert not (await controller.service.report(late)).counted

    asyncio.run(scenario())


def test_a_step_that_a_rank_waits_for_is_sealed_with_the_last_plan_if_nobody_reports(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        clock, policy = Clock(), ScriptedPolicy(alternating)
        with bench(small_run(tmp_path), policy=policy, now=clock) as controller:
            answer = await controller.join_all(2)
            waiting = make_beat(generation=answer.generation, needed_step=2)
            controller.workers.beat(waiting)
            await controller.settle()
            clock.now_s += 0.31
            await controller.settle()
            assert controller.state.sealed_through == 2
            assert [plan.version for plan in controller.plans] == [1]
            assert policy.observed == []
            assert (await controller.service.status()).missing_reports == 2
            await controller.report_step(1, world_size=2)
            assert controller.state.sealed_through == 3

    asyncio.run(scenario())


def test_steps_that_workers_composed_without_a_seal_keep_the_last_plan(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(alternating)) as controller:
            answer = await controller.join_all(1)
            alone = make_beat(generation=answer.generation, composed_through=4, degraded_steps=3)
            controller.workers.beat(alone)
            for step in range(4):
                await controller.report_step(step, degraded=step >= 2)
            assert [plan.first_step for plan in controller.plans] == [0, 5]
            assert (await controller.service.status()).degraded_steps >= 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_sum", np.array([np.nan, 1, 1])),
        ("loss_sum", np.array([np.inf, 1, 1])),
        ("loss_sum", np.array([-5.0, 1, 1])),
        ("loss_sum", np.array([1.0, 1])),
        ("tokens", np.array([-1, 0, 0])),
        ("tokens", np.array([10_000, 0, 0])),
        ("sequences", np.array([9, 0, 0])),
        ("alignment_part", np.full((3, 3), np.nan)),
        ("alignment_part", np.zeros((2, 2))),
        ("alignment_share", 1.5),
        ("weight_norms", (1.0, float("nan"))),
        ("update_norms", (-1.0,)),
        ("step_s", float("inf")),
        ("cursors", {9: np.zeros((3, 3), dtype=np.uint32)}),
        ("cursors", {0: np.zeros((2, 3), dtype=np.uint32)}),
        ("step", 2),
        ("step", -1),
        ("rank", 3),
    ],
)
def test_a_report_that_cannot_be_right_changes_nothing_and_says_where(
    tmp_path: Path, field: str, value: object
) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(alternating)
        with bench(small_run(tmp_path), policy=policy) as controller:
            await controller.join_all(1)
            fields = {"step": 0, "rank": 0, field: value}
            rank = fields.pop("rank")
            report = make_report(controller.spec, **{**fields, "rank": 0})  # type: ignore[arg-type]
            if rank:
                report = make_report(controller.spec, rank=3, world_size=4)
            with pytest.raises(InvalidMessage, match=rf"rank {rank}, step {fields['step']}"):
                await controller.service.report(report)
            await controller.settle()
            assert policy.observed == []
            assert controller.state.sealed_through == 1
            await controller.report_step(0)
            assert len(policy.observed) == 1

    asyncio.run(scenario())


def test_a_report_of_an_ended_generation_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            with pytest.raises(StaleGeneration, match="join again"):
                await controller.service.report(make_report(controller.spec))
            await controller.join_all(1)
            await controller.join_all(1, attempt="b")
            with pytest.raises(StaleGeneration, match="generation 2 has begun"):
                await controller.service.report(make_report(controller.spec, generation=1))

    asyncio.run(scenario())


def test_a_report_that_comes_twice_counts_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(2)
            report = make_report(controller.spec, rank=0, world_size=2)
            assert (await controller.service.report(report)).counted
            assert not (await controller.service.report(report)).counted
            await controller.settle()
            assert controller.state.observed_through == -1

    asyncio.run(scenario())


def test_a_resumed_generation_replays_the_plans_and_asks_the_policy_nothing_twice(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(alternating)
        with bench(small_run(tmp_path), policy=policy) as controller:
            await controller.join_all(1)
            for step in range(8):
                await controller.report_step(step)
            before = controller.plans
            answer = await controller.join_all(1, attempt="b", resume=resume_at(3, controller.spec))
            assert answer.first_step == 3
            assert set(answer.cursor_steps.values()) == {3}
            for step in range(3, 8):
                await controller.report_step(step)
            assert controller.plans == before
            assert [observation.step for observation in policy.observed] == list(range(8))
            await controller.report_step(8)
            assert controller.plans[-1].first_step == 10
            (fork,) = controller.ledger.rows(Kind.FORK)
            assert (fork.step, fork.body["trained_through"]) == (3, 7)

    asyncio.run(scenario())


def test_every_plan_is_in_the_ledger_before_it_is_announced(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(alternating)) as controller:
            await controller.join_all(1)
            for step in range(5):
                await controller.report_step(step)
                written = [plan_of(row) for row in controller.ledger.rows(Kind.PLAN)]
                assert tuple(written) == controller.plans

    asyncio.run(scenario())


def test_a_drained_controller_decides_no_more_but_records(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(alternating)) as controller:
            await controller.join_all(1)
            await controller.service.report(make_report(controller.spec, step=0))
            await controller.service.drain()
            await controller.service.drain()
            assert (await controller.service.status()).sealed_through == 2
            await controller.report_step(1)
            await controller.loop.flush()
            assert (await controller.service.status()).sealed_through == 2
            assert len(list(controller.ledger.rows(Kind.STEP))) == 2
            assert (await controller.service.status()).phase == "drained"

    asyncio.run(scenario())


def test_a_domain_that_lanes_have_read_often_enough_gets_nothing_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path, policy=ODM, guard={"max_epochs": 2, "min_share": 0.05})
        with bench(config) as controller:
            await controller.join_all(1)
            await controller.report_step(0)
            assert min(controller.plans[-1].mixture.shares) >= 0.05
            # One lane is in its third epoch of `code`, the others are behind it.
            cursors = places_after(1, controller.spec)
            next(iter(cursors.values()))[1, 0] = 2
            await controller.report_step(1, cursors=cursors)
            plan = controller.plans[-1]
            assert plan.first_step == 3
            assert plan.mixture.shares[1] == 0
            row = controller.ledger.newest(Kind.STEP)
            assert row is not None
            assert "max_epochs: no more of code" in row.body["reasons"]
            assert row.body["decided_q32"] == list(plan.mixture.shares_q32)

    asyncio.run(scenario())
