"""Whatever reports do, plans are contiguous, ahead by the lag, and carry what they must."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.history import book_from
from controller.ledger_schema import Kind
from protos.types import SHARE_ONE, Generation, Step
from tests.fakes_controller import (
    DOMAINS,
    Bench,
    Clock,
    ScriptedPolicy,
    bench,
    join_request,
    make_beat,
    make_report,
    resume_at,
    small_run,
)

WORLD_SIZE = 3
BOUND = (1 + math.log(len(DOMAINS))) * SHARE_ONE


def _wild(step: Step) -> Sequence[float]:
    """Jump about, and now and then be wrong."""
    draw = np.random.default_rng(step)
    if draw.random() < 0.1:
        return [np.nan, 0.5, 0.5]
    shares = draw.dirichlet([0.3] * len(DOMAINS))
    return [float(share) for share in shares]


_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(0, WORLD_SIZE - 1), st.integers(-3, 3)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.integers(0, 4)),
        st.tuples(st.just("need"), st.just(0), st.integers(1, 4)),
        st.tuples(st.just("compose"), st.just(0), st.integers(1, 4)),
        st.tuples(st.just("rejoin"), st.just(0), st.integers(0, 6)),
    ),
    min_size=5,
    max_size=40,
)


async def _happen(controller: Bench, clock: Clock, event: tuple[str, int, int], count: int) -> None:
    kind, rank, amount = event
    state = controller.state
    assert state.group is not None
    near = state.group.next_step
    if kind == "report":
        step = near + amount
        # A rank can only have trained what was sealed, or composed without a seal.
        if step >= 0:
            report = make_report(
                controller.spec,
                generation=state.generation,
                rank=rank,
                world_size=WORLD_SIZE,
                step=step,
                degraded=step > state.sealed_through,
            )
            await controller.service.report(report)
    elif kind == "step" and near <= state.sealed_through:
        await controller.report_step(near, world_size=WORLD_SIZE)
    elif kind == "wait":
        clock.now_s += 0.1 * amount
    elif kind in ("need", "compose"):
        place = "needed_step" if kind == "need" else "composed_through"
        generation = Generation(state.generation)
        where: dict[str, Any] = {place: state.sealed_through + amount}
        controller.workers.beat(make_beat(generation=generation, **where))
    elif kind == "rejoin":
        step = max(0, state.observed_through + 1 - amount)
        controller.workers.beat(make_beat())
        resume = resume_at(step, controller.spec)
        requests = [
            join_request(r, WORLD_SIZE, attempt=f"at-{count}", resume=resume)
            for r in range(WORLD_SIZE)
        ]
        await asyncio.gather(*(controller.service.join(request) for request in requests))
    await controller.settle()


def _check(controller: Bench, sealed_before: int) -> None:
    state, spec = controller.state, controller.spec
    assert state.sealed_through >= max(sealed_before, state.observed_through + spec.lag)
    book = book_from(controller.ledger, Step(0), spec)
    plans = book.plans
    assert [plan.version for plan in plans] == list(range(1, len(plans) + 1))
    assert all(plan.first_step <= state.sealed_through for plan in plans)
    for step in range(state.sealed_through + 1):
        counts = book.counts(Step(step))
        planned = np.asarray(book.plan_at(Step(step)).mixture.shares) * spec.global_sequences
        assert counts.sum() == spec.global_sequences
        assert (np.abs(counts - planned) < 1).all()
        assert (np.abs(book.carry(Step(step + 1))) <= BOUND).all()
    assert tuple(state.book.carry(Step(state.sealed_through + 1))) == tuple(
        book.carry(Step(state.sealed_through + 1))
    )


@settings(max_examples=40, deadline=None)
@given(events=_EVENTS, lag=st.integers(1, 3))
def test_plans_obey_their_laws_whatever_reports_do(
    events: list[tuple[str, int, int]], lag: int
) -> None:
    async def scenario(folder: Path) -> None:
        clock, policy = Clock(), ScriptedPolicy(_wild)
        config = small_run(folder, control={"lag": lag})
        with bench(config, policy=policy, now=clock) as controller:
            controller.workers.beat(make_beat())
            await controller.join_all(WORLD_SIZE)
            for count, event in enumerate(events):
                sealed = controller.state.sealed_through
                announced = {plan.version: plan for plan in controller.plans}
                await _happen(controller, clock, event, count)
                _check(controller, sealed)
                # What was sealed once stays as it was.
                for plan in controller.plans:
                    if plan.version in announced and plan.first_step > 0:
                        assert plan.mixture == announced[plan.version].mixture
                    elif plan.version > max(announced):
                        assert plan.first_step > sealed
            await controller.loop.flush()
            rows = [row for row in controller.ledger.rows(Kind.STEP) if row.body["to_policy"]]
            assert [row.body["proposed_step"] - row.step for row in rows] == [lag] * len(rows)
            # No step is ever observed twice, and they come in order.
            steps = [observation.step for observation in policy.observed]
            assert steps == sorted(set(steps)) == [row.step for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder)))
