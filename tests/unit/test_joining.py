"""Join as a rank sees it: answers, waits that end, and who is told what."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest

from loader_workers.plans import PlanBoard
from protos.errors import (
    ConfigError,
    Disagreement,
    HeadraceError,
    JoinTimeout,
    NotReady,
    StaleGeneration,
    TooMuchLost,
)
from protos.types import Generation, Lane, Quarantine, Step
from tests.fakes_controller import (
    ScriptedPolicy,
    beats,
    bench,
    join_request,
    make_beat,
    make_report,
    places_after,
    resume_at,
    small_run,
)


def test_ranks_start_together_with_their_own_lanes(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            controller.workers.beat(make_beat())
            first = asyncio.create_task(controller.service.join(join_request(0, 3)))
            second = asyncio.create_task(controller.service.join(join_request(1, 3)))
            await asyncio.sleep(0)
            assert not first.done()
            third = await controller.service.join(join_request(2, 3))
            answers = [await first, await second, third]
            assert {answer.generation for answer in answers} == {1}
            # 8 slots over 3 ranks: 0-1, 2-4, 5-7, in lanes of two slots.
            assert [sorted(answer.cursors) for answer in answers] == [[0], [1, 2], [2, 3]]
            assert [endpoint.lane for endpoint in third.endpoints] == [0, 1, 2, 3]

    asyncio.run(scenario())


def test_a_rank_that_asks_again_gets_the_same_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            answer = await controller.join_all(2)
            again = await controller.service.join(join_request(0, 2))
            assert (again.generation, again.first_step) == (answer.generation, answer.first_step)
            assert sorted(again.cursors) == sorted(answer.cursors)
            anew = await controller.join_all(2, attempt="b")
            assert anew.generation == 2

    asyncio.run(scenario())


def test_generations_grow_over_restarts_of_the_controller(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        for start in range(3):
            with bench(config) as controller:
                answer = await controller.join_all(1, attempt=f"start-{start}")
                assert answer.generation == start + 1

    asyncio.run(scenario())


def test_a_wait_for_ranks_ends_and_names_those_that_are_missing(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            controller.workers.beat(make_beat())
            with pytest.raises(JoinTimeout, match="did not join: 0, 2;"):
                await controller.service.join(join_request(1, 3, timeout_s=0.05))
            # Whoever has gone is not counted any more.
            with pytest.raises(JoinTimeout, match="did not join: 1;"):
                await controller.service.join(join_request(0, 2, timeout_s=0.05))

    asyncio.run(scenario())


def test_a_wait_for_workers_ends_and_a_worker_that_comes_ends_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            with pytest.raises(NotReady, match="start loader workers"):
                await controller.service.join(join_request(0, 1, timeout_s=0.05))
            joining = asyncio.create_task(controller.service.join(join_request(0, 1)))
            gone = asyncio.Event()
            stream = controller.service.enlist(beats(make_beat(), until=gone))
            await anext(stream)
            assert (await joining).generation == 1
            gone.set()
            async for _ in stream:
                pass
            # It may come back at once; but a rank that cannot reach it need not wait for that.
            table = await controller.service.locate(Generation(1))
            assert {each.endpoint for each in table.endpoints} == {make_beat().endpoint}
            with pytest.raises(NotReady):
                await controller.service.locate(Generation(1), unreachable=make_beat().endpoint)
            assert not (await controller.service.status()).workers[0].alive

    asyncio.run(scenario())


def test_a_rank_whose_call_is_cancelled_leaves_the_barrier(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            controller.workers.beat(make_beat())
            gone = asyncio.create_task(controller.service.join(join_request(0, 4)))
            await asyncio.sleep(0)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            # It would have disagreed: of 4 ranks, not of 2.
            assert (await controller.join_all(2)).generation == 1

    asyncio.run(scenario())


def test_ranks_that_disagree_are_all_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            controller.workers.beat(make_beat())
            outcomes = await asyncio.gather(
                controller.service.join(join_request(0, 3)),
                controller.service.join(join_request(1, 3)),
                controller.service.join(join_request(2, 3, global_sequences=16)),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [Disagreement] * 3
            assert len({str(outcome) for outcome in outcomes}) == 1
            assert (await controller.join_all(3, attempt="b")).generation == 1

    asyncio.run(scenario())


def test_the_old_process_of_a_rank_is_told_that_another_took_its_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            controller.workers.beat(make_beat())
            old = asyncio.create_task(controller.service.join(join_request(0, 2)))
            await asyncio.sleep(0)
            await controller.join_all(2, attempt="b")
            with pytest.raises(StaleGeneration, match="took this one's place"):
                await old

    asyncio.run(scenario())


def test_places_after_a_restart_come_from_the_ledger_at_the_step_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config) as controller:
            await controller.join_all(2)
            for step in range(6):
                await controller.report_step(step, world_size=2)
            await controller.loop.flush()
        with bench(config) as controller:
            answer = await controller.join_all(1, attempt="b", resume=resume_at(4, controller.spec))
            assert set(answer.cursor_steps.values()) == {4}
            for lane, places in places_after(3, controller.spec).items():
                np.testing.assert_array_equal(answer.cursors[lane], places)
            event, _ = controller.state.next_event(None)
            assert event.reset
            assert event.plans[0].first_step == 4

    asyncio.run(scenario())


def test_the_hindmost_place_says_from_where_workers_hear_the_plans(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(1)
            for step in range(6):
                await controller.report_step(step)
            behind = {Lane(2): places_after(1, controller.spec)[Lane(2)]}
            resume = resume_at(5, controller.spec, cursors=behind)
            answer = await controller.join_all(1, attempt="b", resume=resume)
            # A checkpoint's own place counts as its step's; others come from the ledger.
            assert set(answer.cursor_steps.values()) == {5}
            event, told = controller.state.next_event(None)
            assert [plan.first_step for plan in event.plans] == [5]
            assert event.plans[0].carry_q32 == tuple(
                controller.state.book.carry(event.plans[0].first_step)
            )
            again, _ = controller.state.next_event(told)
            assert (again.plans, again.reset) == ((), False)

    asyncio.run(scenario())


def test_a_worker_that_is_told_between_report_and_decision_takes_in_the_next_plan(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path, control={"lag": 1})
        policy = ScriptedPolicy(lambda step: (0, 0, 1))
        with bench(config, policy=policy) as controller:
            await controller.join_all(1)
            # As while step 0 is committed: its places are known, the plan of step 1 is not told.
            controller.state.move_cursors(Step(0), places_after(0, controller.spec))
            first, told = controller.state.next_event(None)
            await controller.report_step(0)
            then, _ = controller.state.next_event(told)
            assert first.reset
            assert not then.reset
            board = PlanBoard(controller.spec)
            board.hear(first)
            board.hear(then)
            assert [plan.first_step for plan in then.plans] == [1]
            assert board.sealed_through == 1

    asyncio.run(scenario())


def test_a_checkpoint_that_the_ledger_cannot_place_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            with pytest.raises(Disagreement, match="resume at step 50, .* lane 0"):
                await controller.join_all(1, resume=resume_at(50, controller.spec))
            whole = resume_at(50, controller.spec, cursors=places_after(49, controller.spec))
            answer = await controller.join_all(1, resume=whole)
            assert answer.first_step == 50
            assert controller.state.sealed_through == 51
            await controller.report_step(50)
            assert controller.state.sealed_through == 52

    asyncio.run(scenario())


def test_a_drained_controller_lets_nobody_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.service.drain()
            with pytest.raises(ConfigError, match="drained"):
                await controller.service.join(join_request(0, 1))

    asyncio.run(scenario())


def test_a_stop_sends_those_who_wait_away_to_ask_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            joining = asyncio.create_task(controller.service.join(join_request(0, 2)))
            watching = controller.service.watch_plans("worker-0")
            await anext(watching)
            await asyncio.sleep(0)
            controller.service.stop()
            with pytest.raises(NotReady, match="stops"):
                await joining
            with pytest.raises(StopAsyncIteration):
                await anext(watching)

    asyncio.run(scenario())


def test_when_too_much_of_the_data_is_lost_nobody_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config) as controller:
            await controller.join_all(1)
            lost = [
                Quarantine(domain="web", shard="web.tar", sample=sample, reason="not UTF-8")
                for sample in range(4)
            ]
            gone = asyncio.Event()
            few = make_beat("worker-1", quarantines=tuple(lost[:3]))
            many = make_beat("worker-1", quarantines=tuple(lost))
            stream = controller.service.enlist(beats(few, few, many, until=gone))
            with pytest.raises(TooMuchLost, match="4 of 300 samples .* web.tar: not UTF-8"):
                async for _ in stream:
                    pass
            calls = (
                controller.service.report(make_report(controller.spec)),
                controller.service.join(join_request(0, 1)),
                controller.service.locate(Generation(1)),
            )
            for call in calls:
                with pytest.raises(TooMuchLost):
                    await call
            assert len((await controller.service.status()).quarantines) == 4
            await controller.loop.flush()
        with bench(config) as controller:
            assert len(controller.workers.quarantines) == 4
            with pytest.raises(HeadraceError, match="4 of 300"):
                await controller.join_all(1)

    asyncio.run(scenario())
