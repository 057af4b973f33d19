"""Whoever heard what, and however far each worker went alone: the ledger says what was composed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controller.amends import Amendment, amend
from controller.history import book_from, counts_of_their_own, read_amendments
from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind, plan_entry, plan_of, seal_entry
from loader_workers.alone import Alone
from protos.planbook import PlanBook
from protos.spec import RunSpec
from protos.types import AloneSteps, Generation, Lane, Step
from tests.fakes_loader import make_spec, scripted_plans
from tests.unit.test_plan_board import INDEX

SPEC: RunSpec = make_spec(INDEX)
NUM_STEPS = 24


@dataclass(frozen=True)
class Worker:
    """How a worker with one lane went through an outage."""

    heard_through: int
    """The last seal that it heard of; at most the ledger's."""

    composed_through: int


@st.composite
def outages(draw: st.DrawFn) -> tuple[list[int], int, list[Worker]]:
    """Draw the steps that plans begin at, the last seal in the ledger, and the workers."""
    begins = draw(st.sets(st.integers(1, 14), max_size=6))
    sealed = draw(st.integers(max(begins, default=0), 15))
    one = st.builds(Worker, st.integers(0, sealed), st.integers(-1, NUM_STEPS - 4))
    return sorted(begins), sealed, draw(st.lists(one, min_size=1, max_size=4))


def _book(plans: Sequence[object]) -> PlanBook:
    book = PlanBook(global_sequences=SPEC.global_sequences)
    for plan in plans:
        book.add(plan)  # type: ignore[arg-type]
    return book


def _compose(
    book: PlanBook, lane: Lane, worker: Worker
) -> tuple[dict[int, list[int]], tuple[AloneSteps, ...]]:
    """Return the counts that a worker composed each step with, and what it says of those alone."""
    known = _book([plan for plan in book.plans if plan.first_step <= worker.heard_through])
    alone, counts = Alone(), {}
    for number in range(worker.composed_through + 1):
        step = Step(number)
        plans = known if step <= worker.heard_through else alone.compose(step, [lane], known)
        counts[number] = plans.counts(step).tolist()
    return counts, alone.said()


def _amend(book: PlanBook, sealed: int, workers: Sequence[Worker], newest: int) -> Amendment:
    said = [_compose(book, Lane(lane), worker)[1] for lane, worker in enumerate(workers)]
    return amend(
        book,
        [each for of_one in said for each in of_one],
        generation=Generation(1),
        heard_through=max(worker.heard_through for worker in workers),
        sealed_through=sealed,
        newest_version=newest,
        split_through={},
    )


@settings(max_examples=40, deadline=None)
@given(outages())
def test_every_step_of_every_lane_is_in_the_ledger_as_it_was_composed(
    outage: tuple[list[int], int, list[Worker]],
) -> None:
    begins, sealed, workers = outage
    shares = [[0.3, 0.7], [0.8, 0.2], [0.5, 0.5], [0.1, 0.9], [0.6, 0.4], [0.25, 0.75], [0.9, 0.1]]
    plans = scripted_plans(SPEC, {0: shares[0], **dict(zip(begins, shares[1:], strict=False))})
    book = _book(plans)
    amendment = _amend(book, sealed, workers, plans[-1].version)
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger") as ledger:
        entries: list[Entry] = [plan_entry(plan, reason="") for plan in plans]
        for step in range(0, sealed + 1, 3):
            carry = book.carry(Step(step + 1))
            entries.append(seal_entry(step, observed_through=step, carry_after=carry))
        ledger.commit(entries)
        ledger.commit(amendment.entries)
        _assert_as_composed(ledger, book, workers)
        held = book_from(ledger, Step(0), SPEC)
        assert held.plans == amendment.book.plans
        for first in range(0, NUM_STEPS, 5):
            later = book_from(ledger, Step(first), SPEC)
            assert later.carry(Step(first)).tolist() == held.carry(Step(first)).tolist()
        versions = [plan_of(row).version for row in ledger.rows(Kind.PLAN)]
        assert versions == sorted(set(versions))


def _assert_as_composed(ledger: Ledger, before: PlanBook, workers: Sequence[Worker]) -> None:
    own, held = counts_of_their_own(ledger, SPEC), book_from(ledger, Step(0), SPEC)
    amendments = read_amendments(ledger)
    for number, worker in enumerate(workers):
        lane = Lane(number)
        for step, counts in _compose(before, lane, worker)[0].items():
            common: NDArray[np.int64] = held.counts(Step(step))
            assert own.get(step, {}).get(lane, common).tolist() == counts
            assert (amendments.version_of(Step(step), lane) is None) == (
                lane not in own.get(step, {})
            )


@settings(max_examples=100, deadline=None)
@given(outages())
def test_an_amendment_leaves_nothing_to_amend_and_takes_back_no_seal_that_was_heard(
    outage: tuple[list[int], int, list[Worker]],
) -> None:
    begins, sealed, workers = outage
    mixtures = {0: [0.3, 0.7], **{step: [step / 20, 1 - step / 20] for step in begins}}
    plans = scripted_plans(SPEC, mixtures)
    book = _book(plans)
    amendment = _amend(book, sealed, workers, plans[-1].version)
    heard = max(worker.heard_through for worker in workers)
    for step in range(heard + 1):
        assert amendment.book.plan_at(Step(step)) == book.plan_at(Step(step))
    said = [_compose(book, Lane(lane), worker)[1] for lane, worker in enumerate(workers)]
    splits = {lane: split.last_step for split in amendment.splits for lane in split.lanes}
    again = amend(
        amendment.book,
        [each for of_one in said for each in of_one],
        generation=Generation(1),
        heard_through=heard,
        sealed_through=sealed,
        newest_version=amendment.book.newest.version,
        split_through=splits,
    )
    assert again.entries == []
