"""A session whose batches are taken ahead, in DataLoaders, and near forks."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import trainer_client
from protos.errors import ConfigError, ControllerUnreachable
from tests.fakes_trainer import FakeRun, make_spec, sequence
from trainer_client import Batch, Session


@pytest.fixture
def run() -> Iterator[FakeRun]:
    with FakeRun(make_spec()).serving() as started:
        yield started


@pytest.fixture
def session(run: FakeRun) -> Iterator[Session]:
    with connect(run) as joined:
        yield joined


def connect(run: FakeRun, **options: Any) -> Session:
    return trainer_client.connect(run.address, rank=0, world_size=1, **options)


def train(session: Session, batch: Batch) -> None:
    """Use a batch as a trainer would."""
    session.use(batch)
    session.record_losses(torch.ones(batch.labels.shape) * batch.loss_mask, batch)
    if batch.last_of_step:
        session.end_step()


def rows(batches: list[Batch]) -> list[tuple[int, int, list[int]]]:
    return [
        (int(batch.step), slot, batch.tokens[row].tolist())
        for batch in batches
        for row, slot in enumerate(batch.slots)
    ]


def by_the_book(run: FakeRun, first_step: int = 0) -> list[tuple[int, int, list[int]]]:
    return [
        (step, slot, sequence(run.spec, step, slot)[:-1].tolist())
        for step in range(first_step, run.spec.num_steps)
        for slot in range(run.spec.global_sequences)
    ]


@pytest.mark.parametrize("ahead", [1, 2, 5, 18])
def test_batches_taken_ahead_are_the_same_and_only_ended_steps_are_in_the_state(
    run: FakeRun, session: Session, ahead: int
) -> None:
    batches = session.batches(4, ahead=True)
    waiting, done = [next(batches) for _ in range(ahead)], []
    while waiting:
        batch = waiting.pop(0)
        train(session, batch)
        done.append(batch)
        ended = batch.step + 1 if batch.last_of_step else batch.step
        assert session.state_dict()["step"] == ended
        waiting += [taken for taken in [next(batches, None)] if taken is not None]
    assert rows(done) == by_the_book(run)
    assert session._reporter.flush(timeout_s=10)
    reports = run.controller.reports
    assert [report.step for report in reports] == list(range(run.spec.num_steps))
    for report in reports:
        assert report.tokens.sum() == report.loss_sum.sum() > 0


def test_what_was_taken_ahead_comes_again_after_a_resume(run: FakeRun, session: Session) -> None:
    batches = session.batches(12, ahead=True)
    taken = [next(batches) for _ in range(4)]
    train(session, taken[0])
    state = session.state_dict()
    assert rows([next(session.batches(12, ahead=True))]) == rows(taken[1:2])  # nothing is lost here
    with connect(run, resume=state) as resumed:
        again = []
        for batch in resumed.batches(12):
            again.append(batch)
            resumed.end_step()
    assert rows(again) == by_the_book(run, 1)


def test_a_batch_of_a_step_that_is_not_due_is_refused(session: Session) -> None:
    batches = session.batches(12, ahead=True)
    next(batches)
    with pytest.raises(ValueError, match="of step 1 is used before step 0 has ended"):
        session.use(next(batches))


def test_a_loader_gives_the_batches_and_its_length_is_the_runs(
    run: FakeRun, session: Session
) -> None:
    loader = session.loader(5)
    assert isinstance(loader, DataLoader)
    assert len(loader) == run.spec.num_steps * 3
    done = []
    for batch in loader:
        train(session, batch)
        done.append(batch)
    assert rows(done) == by_the_book(run)


# Python's own, of forking with threads; that is what is tried here.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_loader_with_worker_processes_is_refused(session: Session) -> None:
    dataset = session.loader(4).dataset
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ConfigError, match="num_workers=0, the session prefetches by itself"):
        next(iter(loader))


def test_a_session_does_not_go_to_a_spawned_process(session: Session) -> None:
    with pytest.raises(TypeError, match="belongs to the process that made it"):
        pickle.dumps(session.loader(4).dataset)


def _in_fork(session: Session, answers: Any) -> None:
    try:
        session.batches(4)
    except ValueError as error:
        answers.put(str(error))
    session.close()  # does nothing to the parent's


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_is_refused_and_leaves_its_parent_alone(run: FakeRun, session: Session) -> None:
    batches = session.batches(12)
    next(batches)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_in_fork, args=(session, answers))
    child.start()
    assert f"belongs to process {os.getpid()}, not to its fork {child.pid}" in answers.get()
    child.join(20)
    session.end_step()
    for _ in batches:
        session.end_step()
    assert session._reporter.flush(timeout_s=10)
    assert len(run.controller.reports) == run.spec.num_steps


def test_a_trainer_that_counts_no_losses_is_told_once(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in session.batches(12):
            session.end_step()
    told = [one.getMessage() for one in caplog.records if "0 tokens" in one.getMessage()]
    assert len(told) == 1
    assert "step 0 ended without losses" in told[0]


def test_a_controller_that_is_away_for_long_costs_reports_and_one_warning_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeRun(make_spec(num_steps=60)).serving() as run, connect(run) as session:
        # The reporter gives a report up after this time; a minute of it is tried elsewhere.
        session._reporter._budget_s = 0.05
        run.controller.fail_reports_with = ControllerUnreachable("away")
        batches = session.batches(12)
        with caplog.at_level(logging.WARNING):
            for _ in range(40):
                train(session, next(batches))
            assert session._reporter.flush(timeout_s=30)
            dropped = session.reports_dropped
            assert dropped > 0
            run.controller.fail_reports_with = None
            for batch in batches:
                train(session, batch)
            assert session._reporter.flush(timeout_s=30)
        assert session.reports_dropped == dropped
        assert session.reports_sent == 60 - dropped
        assert [report.step for report in run.controller.reports][-1] == 59
    lost = [one for one in caplog.records if "report rank=0" in one.getMessage()]
    assert len(lost) == 1


def test_time_waited_for_data_is_in_the_reports(run: FakeRun) -> None:
    spec = dataclasses.replace(run.spec, data_timeout_s=5.0)
    with FakeRun(spec).serving() as slow, connect(slow) as session:
        for batch in session.batches(12):
            train(session, batch)
        assert session._reporter.flush(timeout_s=10)
        waits = [report.data_wait_s for report in slow.controller.reports]
        assert waits[0] > 0  # the first step's streams had to be opened
        assert sum(waits) == pytest.approx(session.data_wait_s)
