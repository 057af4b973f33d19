"""A session against a controller and workers on real gRPC: every slot once, whatever breaks."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import trainer_client
from protos.errors import (
    ConfigError,
    ControllerUnreachable,
    InvalidMessage,
    JoinTimeout,
    NotReady,
    StaleGeneration,
    WorkerUnreachable,
)
from protos.types import Step, StepBatch
from tests.fakes_trainer import (
    FakeRun,
    make_spec,
    wait_until,
)
from tests.sessions import check_by_the_book, connect, every_slot, train


@pytest.fixture
def run() -> Iterator[FakeRun]:
    with FakeRun(make_spec()).serving() as started:
        yield started


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_ranks_together_get_every_slot_once(world_size: int, num_workers: int) -> None:
    seen: list[tuple[int, int]] = []
    num_batches = set()
    with FakeRun(make_spec(), num_workers=num_workers).serving() as run:
        for rank in range(world_size):
            with connect(run, rank=rank, world_size=world_size) as session:
                batches = train(session, micro_batch=2)
                seen += check_by_the_book(run, batches)
                num_batches.add(len(batches))
    assert sorted(seen) == every_slot(run)
    assert len(num_batches) == 1  # else the ranks' collectives would not meet


def test_a_rank_that_has_one_sequence_fewer_gets_a_filler_that_counts_nothing() -> None:
    with (
        FakeRun(make_spec(lanes=1, global_sequences=3)).serving() as run,
        connect(run, rank=0, world_size=2) as session,
    ):
        batches = []
        for batch in session.batches(micro_batch=1):
            batches.append(batch)
            session.loss(torch.zeros(*batch.tokens.shape, 10), batch)
            if batch.last_of_step:
                session.end_step()
                break
        assert [len(batch.slots) for batch in batches] == [1, 0]
        assert not batches[1].loss_mask.any()
        assert session._reporter.flush(timeout_s=10)
    assert run.controller.reports[0].sequences.sum() == 1


def test_dtypes_shapes_and_marks_are_as_promised(run: FakeRun) -> None:
    with connect(run) as session:
        first, second, third = train(session, until=1, micro_batch=5)
    assert [batch.tokens.shape for batch in (first, second, third)] == [(5, 5), (5, 5), (2, 5)]
    assert first.tokens.dtype == first.labels.dtype == first.domain_ids.dtype == torch.int64
    assert first.loss_mask.dtype == torch.bool
    assert [batch.last_of_step for batch in (first, second, third)] == [False, False, True]
    assert [batch.first_of_step for batch in (first, second, third)] == [True, False, False]


def test_a_broken_stream_goes_on_without_gap_or_duplicate(
    run: FakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    for worker in run.workers:
        worker.break_before = {0, 2, 3, 5}
    with caplog.at_level(logging.CRITICAL), connect(run) as session:
        seen = check_by_the_book(run, train(session))
    assert seen == every_slot(run)
    assert all(not worker.break_before for worker in run.workers)
    assert [int(opening.from_step) for opening in run.workers[0].openings] == [0, 0, 2, 3, 5]


def test_lanes_that_move_to_other_workers_are_followed_and_parted(run: FakeRun) -> None:
    first, second = run.workers
    first.held_step = 3
    with connect(run) as session:
        batches = session.batches(12)
        taken = []
        for _ in range(3):
            taken.append(next(batches))
            session.end_step()
        # Lane 0 stays, lane 1 moves; the stream that had both breaks.
        run.controller.endpoints[1] = run.endpoints[1]
        first.release.set()
        first.break_before = {3}
        for batch in batches:
            taken.append(batch)
            session.end_step()
    assert check_by_the_book(run, taken) == every_slot(run)
    assert [sorted(opening.cursors) for opening in first.openings] == [[0, 1], [0]]
    assert [sorted(opening.cursors) for opening in second.openings] == [[2, 3], [1]]


def test_a_worker_that_hangs_is_left_when_the_controller_gives_its_lanes_away(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.feed._LOOK_AGAIN_S", 0.2)
    run.workers[0].held_step = 2
    with connect(run) as session:
        batches = session.batches(12)
        taken = []
        for batch in batches:
            taken.append(batch)
            session.end_step()
            if batch.step == 1:
                run.controller.endpoints = [run.endpoints[1]] * run.spec.lanes
    assert check_by_the_book(run, taken) == every_slot(run)
    assert not run.workers[0].release.is_set()


def test_a_trainer_that_waits_says_for_which_step() -> None:
    with FakeRun(make_spec(), num_workers=1).serving() as run, connect(run) as session:
        (worker,) = run.workers
        worker.held_step = 1
        batches = session.batches(12)
        next(batches)
        session.end_step()
        waiting = threading.Thread(target=next, args=(batches,))
        waiting.start()
        wait_until(lambda: any(credit.needed_step == 1 for credit in worker.credits))
        worker.release.set()
        # Any credit wakes the worker, which waits for one while it holds a step back.
        session._feed._streams[0]._credits.put(worker.credits[-1])  # type: ignore[union-attr]
        waiting.join(10)
        session.end_step()
        assert session.data_wait_s > 0
        assert not waiting.is_alive()


def test_no_more_steps_are_sent_than_credits_allow() -> None:
    # Steps of 1.5 MB each, so that two are more than is asked for by bytes.
    spec = make_spec(num_steps=50, sequence_length=1 << 16)
    with FakeRun(spec, num_workers=1).serving() as run, connect(run) as session:
        batches = session.batches(12)
        next(batches)
        feed = session._feed
        assert feed is not None
        wait_until(lambda: feed.has(Step(3)))
        assert not feed.has(Step(4))


def test_short_steps_are_asked_for_further_ahead_and_their_credits_go_together() -> None:
    with FakeRun(make_spec(num_steps=500), num_workers=1).serving() as run, connect(run) as session:
        batches = session.batches(12)
        for step in range(200):
            assert next(batches).step == step
            feed = session._feed
            assert feed is not None
            wait_until(partial(feed.has, Step(step + 128 - 32)))
            assert not feed.has(Step(step + 129))
            session.end_step()
        (worker,) = run.workers
        assert worker.openings[0].credits == 128
        # One as it waits for the first step and one as it has it, then one for each 32 steps.
        assert len(worker.credits) <= 2 + 200 // 32


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("world_size", [1, 5])
def test_steps_that_come_together_are_taken_one_by_one(num_workers: int, world_size: int) -> None:
    spec = make_spec(num_steps=60)
    with FakeRun(spec, num_workers=num_workers).serving() as run:
        for number, worker in enumerate(run.workers):
            worker.most_together = 4 + 3 * number
            worker.break_before = {17, 18, 40}
        seen: list[tuple[int, int]] = []
        for rank in range(world_size):
            run.controller.generation = rank + 1
            with connect(run, rank=rank, world_size=world_size) as session:
                batches = train(session, micro_batch=12, until=33)
                state = session.state_dict()
            # The places after a step in the middle of a message are those to go on from.
            with connect(run, rank=rank, world_size=world_size, resume=state) as session:
                seen += check_by_the_book(run, batches + train(session, micro_batch=12))
        assert sorted(seen) == every_slot(run)


def test_a_message_of_some_steps_that_are_not_next_is_refused() -> None:
    with FakeRun(make_spec(num_steps=20), num_workers=1).serving() as run, connect(run) as session:
        (worker,) = run.workers
        worker.most_together = 4
        worker.mangle = lambda batch: dataclasses.replace(batch, step=Step(batch.step + 1))
        with pytest.raises(InvalidMessage, match="lane 0, step 1: expected step 0"):
            train(session)


def test_data_that_does_not_come_raises_in_time_with_the_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeRun(make_spec(data_timeout_s=0.5)).serving() as run, connect(run) as session:
        run.workers[1].fail_with = NotReady("the worker has not heard of generation 1 yet")
        with (
            caplog.at_level(logging.CRITICAL),
            pytest.raises(WorkerUnreachable, match=r"step 0 .* within 0.5 s.*not heard of gener"),
        ):
            train(session)


def test_a_silent_worker_raises_in_time_and_says_which() -> None:
    with FakeRun(make_spec(data_timeout_s=0.5)).serving() as run, connect(run) as session:
        run.workers[1].held_step = 2
        with pytest.raises(NotReady, match=rf"step 2 .*{run.endpoints[1]}.*lanes \[2, 3\]"):
            train(session)


def test_an_error_that_trying_again_cannot_mend_reaches_the_trainer_at_once(run: FakeRun) -> None:
    run.workers[0].fail_with = StaleGeneration("generation 2 has begun")
    with connect(run) as session, pytest.raises(StaleGeneration, match="generation 2"):
        train(session)


def test_a_step_out_of_order_is_refused(run: FakeRun) -> None:
    def skip(batch: StepBatch) -> StepBatch:
        return dataclasses.replace(batch, step=Step(batch.step + 1))

    run.workers[0].mangle = skip
    with connect(run) as session, pytest.raises(InvalidMessage, match="expected step 0"):
        train(session)


def test_a_controller_that_is_not_there_is_told_with_what_to_do() -> None:
    with pytest.raises(
        ControllerUnreachable,
        match=r"^cannot reach the controller at 127.0.0.1:1 after 0.5 s: start it "
        r"\(headrace controller run.yaml\) or check the address, the firewall and, with TLS, ",
    ):
        trainer_client.connect("127.0.0.1:1", rank=0, world_size=1, timeout_s=0.5)


def test_joining_is_tried_again_while_the_run_is_not_ready(run: FakeRun) -> None:
    run.controller.fail_joins = [NotReady("no worker yet"), NotReady("no worker yet")]
    with connect(run) as session:
        assert session.first_step == 0
    assert len({request.attempt_id for request in run.controller.requests}) == 1
    run.controller.fail_joins = [JoinTimeout("rank 1 is missing")] * 100
    with pytest.raises(JoinTimeout, match="rank 1 is missing"):
        connect(run, timeout_s=0.3)


def test_more_ranks_than_sequences_are_refused(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match="13 ranks cannot share the 12 sequences"):
        connect(run, rank=0, world_size=13)


def test_a_session_is_of_no_use_in_a_fork(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(run) as session:
        with monkeypatch.context() as patched:
            patched.setattr("os.getpid", lambda: -1)  # as a fork of this process would see it
            with pytest.raises(ValueError, match="outside DataLoader workers"):
                session.batches()
            session.close()  # leaves the parent's session alone
        assert train(session, until=1)


def test_a_closed_session_says_so_and_closes_twice(run: FakeRun) -> None:
    session = connect(run)
    train(session, until=1)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.batches()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("headrace-lanes")]
