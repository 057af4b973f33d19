"""Shadow policies: they see what the policy sees, are written down, and change nothing."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from controller import history as past
from controller.ledger_schema import Kind, Row
from controller.policy.base import Policy
from controller.shadows import MAX_BACKLOG, Shadow, shadow_names
from deploy.screen import status_panel
from deploy.status_json import status_json
from protos.status import ShadowStatus
from protos.types import Step
from tests.fakes_controller import ACODM, ODM, Bench, ScriptedPolicy, bench, small_run
from tests.laws import assert_same_state

SHADOWS = [ODM, {**ACODM, "warmup_steps": 4}, {"name": "odm", "warmup_steps": 8}]


def _even(step: Step) -> Sequence[float]:
    return (1 / 3, 1 / 3, 1 / 3)


async def _until(made: Bench, condition: Callable[[], bool]) -> None:
    """Let the loop's callbacks run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)
        await made.loop.flush()


def _rows(made: Bench) -> list[Row]:
    return list(made.ledger.rows(Kind.SHADOW, min_step=0))


async def _train(made: Bench, steps: range) -> None:
    """Report steps, and wait until the shadows have seen them."""
    for step in steps:
        await made.report_step(step)
    await _until(made, lambda: not made.shadows._backlog)


def test_names_tell_shadows_of_one_kind_apart() -> None:
    assert shadow_names(["odm", "acodm", "odm", "odm"]) == ["odm", "acodm", "odm-2", "odm-3"]


def test_the_ledger_has_what_each_shadow_proposes_for_the_step_that_is_decided(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path, shadows=SHADOWS)) as made:
            await made.join_all(1)
            await _train(made, range(12))
            rows = _rows(made)
            assert [row.step for row in rows] == list(range(12))
            for row in rows:
                assert row.body["proposed_step"] == row.step + 2
                assert list(row.body["proposals"]) == ["acodm", "odm", "odm-2"]
                for shares in row.body["proposals"].values():
                    assert sum(shares) == pytest.approx(1)
            last = rows[-1].body["proposals"]
            assert len({tuple(shares) for shares in last.values()}) == 3
            assert [status.name for status in made.shadows.statuses] == ["odm", "acodm", "odm-2"]
            status = await made.service.status()
            assert status.shadows == made.shadows.statuses
            assert status.shadows[0].phase == "acting"
            assert status.shadows[0].shares == tuple(last["odm"])
            # Trainers measure what any of them needs; the policy itself needs nothing.
            assert made.spec.probe is not None

    asyncio.run(scenario())


def test_a_shadow_proposes_what_it_would_propose_as_the_policy(tmp_path: Path) -> None:
    async def proposals(folder: Path, **changes: Any) -> list[Any]:
        with bench(small_run(folder, **changes)) as made:
            await made.join_all(1)
            await _train(made, range(12))
            if "shadows" in changes:
                return [row.body["proposals"]["odm"] for row in _rows(made)]
            return [row.body["proposal"] for row in made.ledger.rows(Kind.STEP, min_step=0)]

    as_policy = asyncio.run(proposals(tmp_path / "policy", policy=ODM))
    assert asyncio.run(proposals(tmp_path / "shadow", shadows=[ODM])) == as_policy


def test_with_and_without_shadows_the_plans_are_the_same(tmp_path: Path) -> None:
    async def plans(folder: Path, **changes: Any) -> list[Any]:
        with bench(small_run(folder, policy=ODM, **changes)) as made:
            await made.join_all(1)
            await _train(made, range(15))
            return [(plan.first_step, plan.mixture) for plan in made.plans]

    without = asyncio.run(plans(tmp_path / "without"))
    assert len(without) > 10
    assert asyncio.run(plans(tmp_path / "with", shadows=SHADOWS)) == without


def test_a_shadow_that_fails_is_told_and_harms_nobody(tmp_path: Path) -> None:
    def fail(step: Step) -> Sequence[float]:
        raise RuntimeError("no luck")

    def scripted(name: str, propose: Callable[[Step], Sequence[float]]) -> Shadow:
        return Shadow(name=name, policy=ScriptedPolicy(propose))

    shadows = [
        scripted("bad", fail),
        scripted("odd", lambda step: (float("nan"), 0.5, 0.5)),
        scripted("good", _even),
    ]

    async def scenario() -> None:
        with bench(small_run(tmp_path), shadows=shadows) as made:
            await made.join_all(1)
            await _train(made, range(3))
            for row in _rows(made):
                assert row.body["faults"] == {"bad": "the policy failed: RuntimeError: no luck"}
                assert row.body["proposals"] == {
                    "odd": ["nan", 0.5, 0.5],
                    "good": list(_even(Step(0))),
                }
            assert made.state.observed_through == 2
            assert made.shadows.statuses[0].fault.endswith("no luck")

    asyncio.run(scenario())


def test_a_shadow_that_hangs_delays_no_decision_and_does_not_pile_up(tmp_path: Path) -> None:
    free = threading.Event()

    def hang(step: Step) -> Sequence[float]:
        assert free.wait(60)
        return _even(step)

    async def scenario() -> None:
        slow = ScriptedPolicy(hang)
        config = small_run(tmp_path, steps=1000, guard={"time_budget_s": 0.05})
        with bench(config, shadows=[Shadow(name="slow", policy=slow)]) as made:
            await made.join_all(1)
            try:
                for step in range(MAX_BACKLOG + 10):
                    await made.report_step(step)
                assert made.state.observed_through == MAX_BACKLOG + 9
                assert made.metrics.totals.held_decisions == 0
                await made.loop.flush()
                missed = _rows(made)
                assert [row.step for row in missed] == [MAX_BACKLOG + n for n in range(10)]
                for row in missed:
                    assert not row.body["observed"]
                    assert "steps behind" in row.body["faults"]["slow"]
            finally:
                free.set()
            await _until(made, lambda: not made.shadows._backlog)
            first = next(row for row in _rows(made) if row.step == 0)
            assert first.body["faults"] == {"slow": "the policy took more than 0.05 s"}
            assert len(slow.observed) == MAX_BACKLOG

    asyncio.run(scenario())


def _policies(made: Bench) -> list[Policy]:
    return [shadow.policy for shadow in made.shadows._shadows]


async def _states(made: Bench) -> list[Any]:
    """Ask on the policies' own thread, behind what they are still at."""
    thread = made.shadows._thread
    assert thread is not None
    return await thread.call(lambda: [policy.state() for policy in _policies(made)])


@pytest.mark.parametrize("last", [5, 10, 17])
def test_restarted_shadows_go_on_where_they_were(tmp_path: Path, last: int) -> None:
    """With a snapshot after 10 steps, or without one."""
    config = small_run(tmp_path, shadows=SHADOWS)

    async def before() -> list[Any]:
        with bench(config) as made:
            await made.join_all(1)
            await _train(made, range(last))
            await made.loop.finish_saving()
            await _until(made, lambda: True)
            return await _states(made)

    async def after() -> list[Any]:
        with bench(config) as made:
            await made.shadows.restore(
                lambda step: made.ledger_thread.call(
                    lambda: list(past.shadow_records_after(made.ledger, step))
                )
            )
            return await _states(made)

    wanted = asyncio.run(before())
    folder = config.snapshots_path / "shadows" / "odm-2"
    assert folder.is_dir() == (last >= 10)
    for state, restored in zip(wanted, asyncio.run(after()), strict=True):
        assert_same_state(restored, state)


def test_a_run_without_shadows_has_no_thread_for_them(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}

    async def scenario() -> None:
        with bench(small_run(tmp_path)) as made:
            await made.join_all(1)
            await made.report_step(0)
            assert made.shadows.statuses == ()
            assert not _rows(made)
            assert "headrace-shadows" not in {t.name for t in threading.enumerate()} - before

    asyncio.run(scenario())


def test_the_status_shows_what_shadows_would_give_most(tmp_path: Path) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path, shadows=[ODM])) as made:
            status = await made.service.status()
        lasting = ShadowStatus(name="odm", phase="acting", shares=(0.5, 0.125, 0.375), fault="")
        broken = ShadowStatus(name="acodm", phase="warm-up", shares=(), fault="it took too long")
        status = replace(status, shadows=(lasting, broken))
        told = status_json(status)["shadows"]
        assert told[0]["mixture"] == {"web": 0.5, "code": 0.125, "books": 0.375}
        assert (told[1]["mixture"], told[1]["fault"]) == (None, "it took too long")
        console = Console(width=120, file=io.StringIO())
        console.print(status_panel(status))
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert "web 50.0% books 37.5% code 12.5%" in shown
        assert "it took too long" in shown

    asyncio.run(scenario())
