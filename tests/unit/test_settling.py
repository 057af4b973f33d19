"""Workers say how far they went alone before they are told plans, and the ledger follows them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from controller.aggregate import RESEND_S
from controller.history import read_history
from controller.ledger import Ledger
from controller.ledger_schema import Kind
from protos.errors import Disagreement, InvalidMessage
from protos.types import AloneSteps, Lane, PlanEvent, Step
from tests.fakes_controller import (
    Bench,
    ScriptedPolicy,
    bench,
    join_request,
    make_beat,
    make_report,
    places_after,
    resume_at,
    small_run,
)

LANES = (0, 1, 2, 3)


def _alone(first: int, last: int, version: int, lanes: Sequence[int] = LANES) -> AloneSteps:
    return AloneSteps(
        first_step=Step(first),
        last_step=Step(last),
        plan_version=version,
        lanes=tuple(Lane(lane) for lane in lanes),
    )


def _beat(controller: Bench, worker: str = "worker-0", **more: Any) -> None:
    """Have a worker say that it has heard whatever it was asked."""
    more.setdefault("generation", controller.state.generation)
    beat = make_beat(worker, heard_epoch=controller.workers.epoch, answered=1 << 20, **more)
    controller.service._take(beat)


async def _left_in_doubt(folder: Path) -> None:
    """A controller sealed steps 0 to 4, with plan 1 to 3 and plan 2 from step 4, and died."""
    policy = ScriptedPolicy(lambda step: (0, 0, 1) if step >= 4 else (1, 0, 0))
    with bench(small_run(folder), policy=policy) as controller:
        await controller.join_all(1)
        for step in range(3):
            await controller.report_step(step)
        assert [plan.first_step for plan in controller.plans] == [0, 2, 4]


async def _next(stream: AsyncIterator[PlanEvent]) -> PlanEvent:
    async with asyncio.timeout(5):
        return await anext(stream)


def _amends(ledger: Ledger) -> list[tuple[int, Any, Any, Any]]:
    names = ("through", "version", "lanes")
    return [(row.step, *(row.body[name] for name in names)) for row in ledger.rows(Kind.AMEND)]


def test_a_worker_that_answers_is_told_plans_once_all_have_said_how_far_they_went(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        await _left_in_doubt(tmp_path)
        with bench(small_run(tmp_path)) as controller:
            stream = controller.service.watch_plans("worker-0", answers=True)
            question = await _next(stream)
            assert (question.asked, question.plans, question.reset) == (1, (), False)
            controller.workers.beat(make_beat(generation=1, composed_through=5))
            await controller.settle()
            assert controller.loop.settling.is_due, "a beat of before the question is no answer"
            telling = asyncio.create_task(_next(stream))
            _beat(controller, composed_through=6, sealed_through=3, alone=(_alone(4, 6, 2),))
            await controller.settle()
            told = await telling
            assert told.reset
            assert _amends(controller.ledger) == [(4, 6, 2, None)]
            assert [plan.version for plan in told.plans] == [2]
            await stream.aclose()  # type: ignore[attr-defined]
            # The policy's next plan comes after what was composed, under a number of its own.
            for step in range(3, 6):
                await controller.report_step(step)
            assert [(p.version, p.first_step) for p in controller.plans] == [(1, 0), (2, 2), (4, 7)]

    asyncio.run(scenario())


def test_a_plan_whose_seal_a_worker_heard_stands_and_the_others_lanes_have_their_own(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        await _left_in_doubt(tmp_path)
        config = small_run(tmp_path)
        with bench(config) as controller:
            told = [controller.service.watch_plans(f"worker-{n}", answers=True) for n in (0, 1)]
            for stream in told:
                await _next(stream)
            _beat(controller, "worker-0", composed_through=4, sealed_through=4)
            mine = _alone(4, 5, 2, lanes=(2, 3))
            _beat(controller, "worker-1", composed_through=5, sealed_through=3, alone=(mine,))
            await controller.settle()
            assert _amends(controller.ledger) == [(4, 5, 2, [2, 3])]
            # It is said again in every beat, and recorded once, also after a restart.
            _beat(controller, "worker-1", composed_through=5, sealed_through=4, alone=(mine,))
            await controller.settle()
            for stream in told:
                await stream.aclose()  # type: ignore[attr-defined]
        with bench(config) as controller:
            assert read_history(controller.ledger, controller.spec).splits == (mine,)
            controller.workers.told_plans("worker-0")
            for _ in range(2):
                _beat(controller, "worker-0", composed_through=5, alone=(mine,))
            await controller.settle()
            assert not controller.loop.settling.is_due
            assert _amends(controller.ledger) == [(4, 5, 2, [2, 3])]

    asyncio.run(scenario())


def test_what_a_worker_composed_alone_counts_also_while_the_controller_lives(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(lambda step: (0, 0, 1) if step >= 4 else (1, 0, 0))
        with bench(small_run(tmp_path), policy=policy) as controller:
            await controller.join_all(1)
            for step in range(3):
                await controller.report_step(step)
            controller.workers.told_plans("worker-0")
            _beat(controller, composed_through=3, sealed_through=3)
            assert not controller.loop.settling.is_due
            _beat(controller, composed_through=4, sealed_through=3, alone=(_alone(4, 4, 2),))
            await controller.settle()
            assert _amends(controller.ledger) == [(4, 4, 2, None)]

    asyncio.run(scenario())


def test_a_new_worker_is_told_plans_also_while_the_ledger_cannot_be_written(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(1)
            controller.loop.scribe.fault = "no space left"
            stream = controller.service.watch_plans("worker-1", answers=True)
            assert (await _next(stream)).asked
            telling = asyncio.create_task(_next(stream))
            await asyncio.sleep(0)
            assert not telling.done()
            _beat(controller, "worker-1")
            told = await telling
            assert told.reset
            assert [plan.version for plan in told.plans] == [1]
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_a_new_generation_begins_with_what_the_old_one_was_given(tmp_path: Path) -> None:
    async def scenario() -> None:
        await _left_in_doubt(tmp_path)
        with bench(small_run(tmp_path)) as controller:
            _beat(controller, composed_through=5, sealed_through=3, alone=(_alone(4, 5, 2),))
            resume = resume_at(6, controller.spec, cursors=places_after(5, controller.spec))
            await controller.service.join(join_request(0, 1, attempt="b", resume=resume))
            assert _amends(controller.ledger) == [(4, 5, 2, None)]
            assert controller.state.generation == 2

    asyncio.run(scenario())


def test_a_lane_is_not_wound_over_steps_in_which_it_had_a_plan_of_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        await _left_in_doubt(tmp_path)
        with bench(small_run(tmp_path)) as controller:
            own = (_alone(4, 5, 2, lanes=(3,)),)
            _beat(controller, composed_through=5, sealed_through=4, alone=own)
            await controller.settle()
            request = join_request(0, 1, attempt="b", resume=resume_at(6, controller.spec))
            with pytest.raises(Disagreement, match="lane 3 is known at step 3 only, and in step 4"):
                await controller.service.join(request)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("alone", "sentence"),
    [
        (_alone(4, 5, 9), "with plan 9; the run's plans are 1 to 1"),
        (_alone(4, 5, 0), "with plan 0; the run's plans are 1 to 1"),
        (_alone(4, 5, 1, lanes=(4,)), r"of lanes \[4\] alone; the run has 40 steps and 4 lanes"),
        (_alone(4, 200_000, 1), r"steps 4..200000 of lanes"),
    ],
)
def test_a_worker_cannot_have_composed_what_there_is_not(
    tmp_path: Path, alone: AloneSteps, sentence: str
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(1)
            with pytest.raises(InvalidMessage, match=sentence):
                _beat(controller, alone=(alone,))

    asyncio.run(scenario())


@pytest.mark.parametrize("first_heard", [3, 4, 5])
def test_where_the_workers_are_dead_the_ledger_follows_what_all_ranks_trained_with(
    tmp_path: Path, first_heard: int
) -> None:
    async def scenario() -> None:
        clock = [1000.0]
        await _left_in_doubt(tmp_path)
        with bench(small_run(tmp_path), now=lambda: clock[0]) as controller:
            # A worker that is new: it has composed nothing, and is not told of plans yet.
            stream = controller.service.watch_plans("worker-0", answers=True)
            assert (await _next(stream)).asked
            _beat(controller)
            await controller.settle()
            assert _amends(controller.ledger) == []
            for step in range(first_heard, 8):
                report = make_report(
                    controller.spec, rank=0, world_size=1, step=step, plan_version=2, degraded=True
                )
                await controller.service.report(report)
            await controller.settle()
            # Reports of the steps before are waited for a while.
            clock[0] += 2 * RESEND_S
            await controller.settle()
            # Also for a step whose report was lost, where ranks had the plan before and after.
            assert _amends(controller.ledger) == [(4, 7, 2, None)]
            book = controller.state.book
            assert [book.plan_at(Step(step)).version for step in range(2, 8)] == [2] * 6
            # What the policy proposes upon these steps holds for none of them.
            assert all(plan.first_step not in range(3, 8) for plan in controller.plans)
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_a_plan_that_some_rank_had_and_the_ledger_has_not_is_disputed_once_for_steps_in_a_row(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(lambda step: (0, 0, 1) if step >= 4 else (1, 0, 0))
        with bench(small_run(tmp_path), policy=policy) as controller:
            await controller.join_all(2)

            async def report(step: int, *versions: int) -> None:
                for rank, version in enumerate(versions):
                    spec = controller.spec
                    await controller.service.report(
                        make_report(spec, rank=rank, world_size=2, step=step, plan_version=version)
                    )
                await controller.settle()

            for step, version in enumerate([1, 1, 2, 2, 2, 2, 3]):
                await report(step, version, controller.state.book.plan_at(Step(step)).version)
            own = _alone(7, 7, 2, lanes=(0, 1))
            controller.workers.told_plans("worker-0")
            _beat(controller, composed_through=7, sealed_through=8, alone=(own,))
            _beat(controller, composed_through=7, sealed_through=8, alone=(own,))
            await controller.settle()
            await report(7, 2, 3)
            await controller.loop.flush()
            events = controller.ledger.rows(Kind.EVENT)
            disputed = [row for row in events if row.body["event"] == "plan disputed"]
            assert [(row.step, row.body["ranks_had"]) for row in disputed] == [(4, [2])]
            assert disputed[0].body["plan"] == 3

    asyncio.run(scenario())
