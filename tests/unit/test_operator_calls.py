"""What operators ask of a controller is done to its end, whether or not they wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from controller.ledger_schema import Kind
from protos.errors import ConfigError, InvalidMessage
from protos.types import Step
from tests.fakes_controller import Clock, ScriptedPolicy, bench, make_beat, make_report, small_run


def test_an_override_before_the_first_generation_says_the_step_that_obeys_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path, control={"lag": 3})) as controller:
            first = await controller.service.set_mixture({"code": 1})
            await controller.join_all(1)
            await controller.report_step(0)
            newest = controller.state.newest_plan
            assert (newest.first_step, list(newest.mixture.shares)) == (first, [0, 1, 0])
            assert first == 3

    asyncio.run(scenario())


def test_a_drain_whose_caller_has_gone_leaves_no_step_half_decided(tmp_path: Path) -> None:
    asked, free = threading.Event(), threading.Event()

    def slow(step: Step) -> Sequence[float]:
        asked.set()
        assert free.wait(20)
        return (0.2, 0.3, 0.5)

    async def scenario() -> None:
        config = small_run(tmp_path, guard={"time_budget_s": 20.0})
        with bench(config, policy=ScriptedPolicy(slow)) as controller:
            await controller.join_all(1)
            await controller.service.report(make_report(controller.spec, step=0))
            call = asyncio.create_task(controller.service.drain())
            await asyncio.to_thread(asked.wait, 20)
            call.cancel()
            await asyncio.wait({call})
            assert call.cancelled()
            free.set()
            await controller.service.drain()
            # The first call may still be saving: the loop waits for that when it stops.
            await controller.loop.finish_saving()
            assert controller.state.observed_through == 0
            assert [row.step for row in controller.ledger.rows(Kind.STEP)] == [0]
            assert [row.step for row in controller.ledger.rows(Kind.SNAPSHOT)] == [0]
            assert controller.plans[-1].first_step == 2

    asyncio.run(scenario())


def test_after_a_drain_a_rank_that_waits_for_a_later_step_is_told_and_nothing_is_closed(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        clock = Clock()
        with bench(small_run(tmp_path), now=clock) as controller:
            answer = await controller.join_all(1)
            await controller.report_step(0)
            await controller.service.drain()
            table = await controller.service.locate(answer.generation)
            assert len(table.endpoints) == controller.spec.lanes
            controller.workers.beat(make_beat(generation=answer.generation, needed_step=3))
            assert not await controller.loop.advance()
            clock.now_s += 1  # longer than the grace time, shorter than a worker's silence
            assert not await controller.loop.advance()
            assert (await controller.service.status()).missing_reports == 0
            with pytest.raises(ConfigError, match="drained: step 2 was the last one"):
                await controller.service.locate(answer.generation)

    asyncio.run(scenario())


def test_a_snapshot_whose_caller_has_gone_is_recorded(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(1)
            call = asyncio.create_task(controller.service.snapshot_policy())
            await asyncio.sleep(0)  # it has begun
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
            path = await controller.service.snapshot_policy()
            await controller.loop.finish_saving()
            assert [row.body["path"] for row in controller.ledger.rows(Kind.SNAPSHOT)] == [path] * 2

    asyncio.run(scenario())


def test_what_a_killed_controller_left_of_a_snapshot_is_removed_by_the_next_one(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        left = config.snapshots_path / ".after-000000007-steps.safetensors.1234.tmp"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"a part")
        with bench(config) as controller:
            path = Path(await controller.service.snapshot_policy())
        assert [each.name for each in config.snapshots_path.iterdir()] == [path.name]

    asyncio.run(scenario())


def test_the_end_of_an_old_stream_of_plans_does_not_unsettle_a_worker_that_opened_a_newer_one(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            await controller.join_all(1)
            old = controller.service.watch_plans("worker-0")
            new = controller.service.watch_plans("worker-0")
            for stream in (old, new):
                await anext(stream)
                asyncio.get_running_loop().call_soon(controller.loop.changed.notify)
                await anext(stream)
            await old.aclose()  # type: ignore[attr-defined]
            for _ in range(2):
                controller.workers.beat(make_beat())
            assert controller.workers.are_settled()
            await new.aclose()  # type: ignore[attr-defined]
            assert not controller.workers.are_settled()

    asyncio.run(scenario())


def test_a_wish_for_workers_is_recorded_and_outlasts_the_controller(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config) as controller:
            controller.workers.beat(make_beat("by-hand"))
            with pytest.raises(ConfigError, match="nobody manages the loader workers"):
                await controller.service.scale(3)
            assert (await controller.service.status()).wanted_workers == 0
            controller.workers.beat(make_beat("worker-0", managed=True))
            with pytest.raises(InvalidMessage, match="at least 1 loader worker, got 0"):
                await controller.service.scale(0)
            await controller.service.scale(3)
            assert (await controller.service.status()).wanted_workers == 3
            await controller.service.scale(2)
        with bench(config) as controller:
            status = await controller.service.status()
            assert status.wanted_workers == 2
            wishes = [row.body["wanted"] for row in controller.ledger.rows(Kind.WORKERS)]
            assert wishes == [3, 2]

    asyncio.run(scenario())
