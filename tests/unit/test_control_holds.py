"""When a plan is held or set against the policy: faults, an overrun, and what operators ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from controller.ledger_schema import Kind
from protos.errors import InvalidMessage, UnknownDomain
from protos.types import Step
from tests.fakes_controller import (
    DOMAINS,
    ScriptedPolicy,
    alternating,
    bench,
    make_report,
    small_run,
)


@pytest.mark.fault_row(31, "a policy that fails or proposes no mixture")
@pytest.mark.parametrize("fault", ["exception", "nan", "negative", "shape"])
def test_a_policy_that_fails_holds_the_last_plan_and_the_reason_is_written(
    tmp_path: Path, fault: str, record_injections: Callable[..., None]
) -> None:
    def failing(step: Step) -> Sequence[float]:
        if step != 3:
            return alternating(step)
        if fault == "exception":
            raise RuntimeError("no idea")
        wrong = {"nan": (np.nan, 0.5, 0.5), "negative": (-1, 1, 1), "shape": (1.0,)}
        return wrong[fault]

    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(failing)) as controller:
            await controller.join_all(1)
            for step in range(4):
                await controller.report_step(step)
            # Step 3 keeps the mixture of step 2, and step 4 wants the same one.
            assert [plan.first_step for plan in controller.plans] == [0, 2, 5]
            assert (await controller.service.status()).held_decisions == 1
            (row,) = controller.ledger.rows(Kind.STEP, min_step=1, max_step=1)
            assert row.body["reasons"][0].startswith("hold: the policy")

    asyncio.run(scenario())
    record_injections(1, fault)


def test_a_policy_that_overruns_its_budget_holds_the_plan_and_observes_in_order(
    tmp_path: Path,
) -> None:
    free = threading.Event()

    def slow(step: Step) -> Sequence[float]:
        if step == 2:
            free.wait(20)
        return alternating(step)

    async def scenario() -> None:
        policy = ScriptedPolicy(slow)
        config = small_run(tmp_path, guard={"time_budget_s": 0.1})
        with bench(config, policy=policy) as controller:
            await controller.join_all(1)
            await controller.report_step(0)
            await controller.report_step(1)
            assert controller.state.sealed_through == 3
            assert (await controller.service.status()).held_decisions == 2
            free.set()
            await controller.service.snapshot_policy()
            await controller.report_step(2)
            assert [plan.first_step for plan in controller.plans] == [0, 4]
            assert [observation.step for observation in policy.observed] == [0, 1, 2]

    asyncio.run(scenario())


def test_calls_are_answered_while_the_policy_thinks(tmp_path: Path) -> None:
    free = threading.Event()

    def slow(step: Step) -> Sequence[float]:
        free.wait(20)
        return alternating(step)

    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(slow)) as controller:
            await controller.join_all(1)
            await controller.service.report(make_report(controller.spec, step=0))
            deciding = asyncio.create_task(controller.loop.advance())
            async with asyncio.timeout(1):
                await controller.service.report(make_report(controller.spec, step=1))
                status = await controller.service.status()
            assert status.sealed_through == 1
            free.set()
            await deciding
            # What came meanwhile is decided and committed along.
            assert (await controller.service.status()).sealed_through == 3

    asyncio.run(scenario())


def test_an_operator_overrides_from_the_step_that_the_call_returns_until_resume(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path), policy=ScriptedPolicy(alternating)) as controller:
            await controller.join_all(1)
            await controller.report_step(0)
            first = await controller.service.set_mixture({"code": 2, "books": 2})
            assert first == 3
            await controller.report_step(1)
            await controller.report_step(2)
            assert controller.state.newest_plan.first_step == first
            assert list(controller.state.newest_plan.mixture.shares) == [0, 0.5, 0.5]
            assert (await controller.service.status()).frozen
            await controller.service.resume()
            await controller.report_step(3)
            assert controller.state.newest_plan.mixture.shares == pytest.approx(
                alternating(Step(5))
            )

    asyncio.run(scenario())


def test_freeze_holds_the_mixture_until_resume_and_outlives_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = small_run(tmp_path)
        with bench(config, policy=ScriptedPolicy(alternating)) as controller:
            await controller.join_all(1)
            await controller.service.freeze()
            await controller.report_step(0)
            assert len(controller.plans) == 1
        with bench(config, policy=ScriptedPolicy(alternating)) as controller:
            assert (await controller.service.status()).frozen
            await controller.join_all(1, attempt="b")
            await controller.service.resume()
            await controller.report_step(0)
            await controller.report_step(1)
            assert [plan.first_step for plan in controller.plans] == [0, 3]

    asyncio.run(scenario())


@pytest.mark.parametrize("shares", [{}, {"web": 0.0}, {"web": -1.0}, {"web": float("nan")}])
def test_an_override_that_is_no_mixture_is_refused(
    tmp_path: Path, shares: dict[str, float]
) -> None:
    async def scenario() -> None:
        with bench(small_run(tmp_path)) as controller:
            with pytest.raises(InvalidMessage):
                await controller.service.set_mixture(shares)
            with pytest.raises(UnknownDomain, match=", ".join(DOMAINS)):
                await controller.service.set_mixture({"wbe": 1.0})

    asyncio.run(scenario())
