"""Lanes that move while a rank trains: the old worker serves up to a step, the new ones from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from protos.errors import NotReady
from tests.fakes_trainer import FakeRun, make_spec
from tests.sessions import check_by_the_book, connect, every_slot
from trainer_client import Batch, Session

pytestmark = pytest.mark.timeout(120)

NUM_STEPS = 800
MOVES_AFTER = 50


@pytest.fixture
def run() -> Iterator[FakeRun]:
    """Three workers, of which the first serves all lanes."""
    with FakeRun(make_spec(num_steps=NUM_STEPS), num_workers=3).serving() as started:
        started.controller.endpoints = [started.endpoints[0]] * started.spec.lanes
        yield started


def spread(run: FakeRun) -> list[str]:
    """Return the endpoints where lanes lie evenly, the first ones where they were."""
    lanes = run.spec.lanes
    return [run.endpoints[lane * 3 // lanes] for lane in range(lanes)]


def train(session: Session, changes: dict[int, Callable[[], None]]) -> list[Batch]:
    """Take every batch; after each step for which there is a change, make it."""
    taken = []
    for batch in session.batches(micro_batch=12):
        taken.append(batch)
        if batch.last_of_step:
            session.end_step()
            changes.get(int(batch.step), lambda: None)()
    return taken


def test_lanes_move_at_a_step_ahead_without_a_gap_an_overlap_or_a_broken_stream(
    run: FakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {MOVES_AFTER: lambda: run.controller.move_lanes(spread(run))}
    with connect(run) as session:
        batches = train(session, changes)
    assert check_by_the_book(run, batches) == every_slot(run)
    before, kept = run.workers[0].openings
    moved = [run.workers[number].openings[0] for number in (1, 2)]
    assert sorted(before.cursors) == list(range(run.spec.lanes))
    starts = {opening.from_step for opening in (kept, *moved)}
    (start,) = starts
    assert start > MOVES_AFTER + 1
    lanes = [lane for opening in (kept, *moved) for lane in opening.cursors]
    assert sorted(lanes) == list(range(run.spec.lanes))
    # They were opened ahead: from cursors of steps that the old worker had yet to follow.
    assert all(step <= start for opening in moved for step in opening.cursor_steps.values())
    assert [len(worker.openings) for worker in run.workers] == [2, 1, 1]
    assert set(run.controller.unreachable) == {""}
    assert "broke" not in caplog.text


def test_lanes_that_come_together_again_come_over_one_stream(run: FakeRun) -> None:
    changes = {
        MOVES_AFTER: lambda: run.controller.move_lanes(spread(run)),
        MOVES_AFTER + 330: lambda: run.controller.move_lanes([run.endpoints[1]] * run.spec.lanes),
    }
    with connect(run) as session:
        batches = train(session, changes)
        assert session._feed is not None
    assert check_by_the_book(run, batches) == every_slot(run)
    assert sorted(run.workers[1].openings[-1].cursors) == list(range(run.spec.lanes))


def test_a_worker_that_breaks_while_it_hands_over_costs_no_step(
    run: FakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    # One of them falls between the word of the move and the step from which it holds.
    run.workers[0].break_before = set(range(MOVES_AFTER + 2, MOVES_AFTER + 12))
    run.workers[1].break_before = set(range(MOVES_AFTER + 2, NUM_STEPS, 40))
    changes = {MOVES_AFTER: lambda: run.controller.move_lanes(spread(run))}
    with connect(run) as session:
        batches = train(session, changes)
    assert check_by_the_book(run, batches) == every_slot(run)
    assert "the worker was told to break here" in caplog.text
    assert run.endpoints[0] in run.controller.unreachable


def test_a_table_that_cannot_be_had_is_asked_for_with_the_next_report(run: FakeRun) -> None:
    run.controller.fail_locates = [NotReady("no worker serves all lanes now") for _ in range(5)]
    changes = {MOVES_AFTER: lambda: run.controller.move_lanes(spread(run))}
    with connect(run) as session:
        batches = train(session, changes)
    assert check_by_the_book(run, batches) == every_slot(run)
    assert run.controller.fail_locates == []
    assert [len(worker.openings) for worker in run.workers] == [2, 1, 1]


def test_lanes_that_would_move_after_the_last_step_stay(run: FakeRun) -> None:
    changes = {NUM_STEPS - 2: lambda: run.controller.move_lanes(spread(run))}
    with connect(run) as session:
        batches = train(session, changes)
    assert check_by_the_book(run, batches) == every_slot(run)
    assert [len(worker.openings) for worker in run.workers] == [1, 0, 0]
