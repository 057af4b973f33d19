"""A session against a controller and workers on real gRPC: every slot once, whatever breaks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainer_client
from protos.errors import (
    ConfigError,
    ControllerUnreachable,
    Disagreement,
    InvalidMessage,
    JoinTimeout,
    NotReady,
    StaleGeneration,
    WorkerUnreachable,
)
from protos.spec import ValidationSpec
from protos.types import Step, StepBatch
from tests.fakes_trainer import (
    FakeRun,
    cursor_before,
    domain_of,
    make_spec,
    num_tokens_of,
    sequence,
    wait_until,
)
from trainer_client import Batch, Session
from trainer_client.reporter import CAPACITY, MOST_IN_A_CALL


def connect(run: FakeRun, *, rank: int = 0, world_size: int = 1, **options: Any) -> Session:
    return trainer_client.connect(run.address, rank=rank, world_size=world_size, **options)


def train(session: Session, *, until: int | None = None, micro_batch: int = 4) -> list[Batch]:
    """Take every batch and end every step."""
    taken = []
    for batch in session.batches(micro_batch):
        taken.append(batch)
        if batch.last_of_step:
            session.end_step()
            if batch.step + 1 == until:
                break
    return taken


def check_by_the_book(run: FakeRun, batches: list[Batch]) -> list[tuple[int, int]]:
    """Hold every sequence against what its slot must be; return the (step, slot) seen."""
    seen = []
    for batch in batches:
        for row, slot in enumerate(batch.slots):
            expected = sequence(run.spec, batch.step, slot)
            assert batch.tokens[row].tolist() == expected[:-1].tolist()
            assert batch.labels[row].tolist() == expected[1:].tolist()
            assert batch.domain_ids[row] == domain_of(run.spec, batch.step, slot)
            num_labels = num_tokens_of(run.spec, batch.step, slot) - 1
            mask = [position < num_labels for position in range(run.spec.sequence_length)]
            assert batch.loss_mask[row].tolist() == mask
            seen.append((int(batch.step), slot))
    return seen


def every_slot(run: FakeRun, first_step: int = 0) -> list[tuple[int, int]]:
    steps = range(first_step, run.spec.num_steps)
    return [(step, slot) for step in steps for slot in range(run.spec.global_sequences)]


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


def test_a_state_resumes_with_the_next_step_on_another_number_of_ranks(run: FakeRun) -> None:
    states = []
    seen: list[tuple[int, int]] = []
    for rank in range(3):
        with connect(run, rank=rank, world_size=3) as session:
            batches = session.batches(micro_batch=12)
            for _ in range(2):
                seen += check_by_the_book(run, [next(batches)])
                session.end_step()
            next(batches)  # taken, not trained: no part of the state
            states.append(json.loads(json.dumps(session.state_dict())))
    assert states[0]["step"] == 2
    state = trainer_client.merge_states(states)
    assert sorted(state["cursors"]) == ["0", "1", "2", "3"]
    assert state["cursors"]["3"] == cursor_before(run.spec, 3, 2).tolist()
    for rank in range(2):
        with connect(run, rank=rank, world_size=2, resume=state) as session:
            assert session.first_step == 2
            assert {**session.state_dict(), "world_size": 3}["step"] == 2
            seen += check_by_the_book(run, train(session))
    assert sorted(seen) == every_slot(run)


def test_a_state_can_be_loaded_after_connecting(run: FakeRun) -> None:
    with connect(run) as session:
        train(session, until=2)
        state = session.state_dict()
    with connect(run) as session:
        session.load_state_dict(state)
        assert session.first_step == 2
        assert session.state_dict() == state
        assert check_by_the_book(run, train(session)) == every_slot(run, 2)
        with pytest.raises(ValueError, match="after batches"):
            session.load_state_dict(state)


def test_a_cursor_of_an_earlier_step_is_passed_on_and_kept_out_of_the_state(run: FakeRun) -> None:
    run.controller.first_step, run.controller.cursor_step = 3, 1
    with connect(run) as session:
        assert session.state_dict()["cursors"] == {}
        assert check_by_the_book(run, train(session)) == every_slot(run, 3)
    assert set(run.workers[0].openings[0].cursor_steps.values()) == {1}


def test_a_state_of_another_order_is_refused(run: FakeRun) -> None:
    with connect(run) as session:
        state = {**session.state_dict(), "order_sha256": "of another seed"}
    with pytest.raises(Disagreement, match="another order"):
        connect(run, resume=state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 7}, "version 7"),
        ({"cursors": {"a": 1}}, "damaged"),
        ({"cursors": [1]}, "damaged"),
    ],
)
def test_a_damaged_state_is_told_in_a_sentence(
    run: FakeRun, change: dict[str, Any], sentence: str
) -> None:
    with connect(run) as session:
        state = session.state_dict()
    with pytest.raises(ConfigError, match=sentence):
        connect(run, resume={**state, **change})
    with pytest.raises(ConfigError, match="lacks step"):
        connect(run, resume={name: value for name, value in state.items() if name != "step"})


def test_ending_a_step_too_early_or_not_at_all_is_refused(run: FakeRun) -> None:
    with connect(run) as session:
        batches = session.batches(micro_batch=6)
        with pytest.raises(ValueError, match="before the last micro-batch of step 0"):
            session.end_step()
        next(batches)
        with pytest.raises(ValueError, match="before the last micro-batch of step 0"):
            session.end_step()
        next(batches)
        with pytest.raises(ValueError, match="was not called .* step 0"):
            next(batches)
        again = session.batches(micro_batch=12)
        assert check_by_the_book(run, [next(again)]) == every_slot(run)[:12]
        session.end_step()
        assert next(again).step == 1


def test_reports_say_what_was_delivered_and_what_it_cost(run: FakeRun) -> None:
    torch.manual_seed(0)
    with connect(run, rank=1, world_size=2) as session:
        expected = np.zeros(3)
        for batch in session.batches(micro_batch=4):
            logits = torch.randn(*batch.tokens.shape, 50_000)
            loss = session.loss(logits, batch)
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch.labels, reduction="none"
            )
            kept = losses * batch.loss_mask
            torch.testing.assert_close(loss, kept.sum() * 2 / (12 * 5))
            for row, domain in enumerate(batch.domain_ids.tolist()):
                expected[domain] += kept[row].sum().item()
            if batch.last_of_step:
                session.end_step()
                break
        assert session._reporter.flush(timeout_s=10)
        assert session.reports_sent == 1
    (report,) = run.controller.reports
    assert (report.generation, report.rank, report.step) == (1, 1, 0)
    slots = range(6, 12)
    for domain in range(3):
        mine = [slot for slot in slots if domain_of(run.spec, 0, slot) == domain]
        assert report.sequences[domain] == len(mine)
        assert report.tokens[domain] == sum(num_tokens_of(run.spec, 0, s) - 1 for s in mine)
    np.testing.assert_allclose(report.loss_sum, expected, rtol=1e-5)
    assert sorted(report.cursors) == [2, 3]
    np.testing.assert_array_equal(report.cursors[2], cursor_before(run.spec, 2, 1))  # type: ignore[index]
    assert report.step_s > 0


def test_reports_carry_what_some_policies_need() -> None:
    spec = dataclasses.replace(
        make_spec(), validation=(ValidationSpec(every=1, period=2, span=1),), needs_reference=True
    )
    with FakeRun(spec).serving() as run, connect(run) as session:
        expected = np.zeros((3, 3))
        evaluation = {"domain-2": 1.0, "domain-0": 3.0, "domain-1": 2.0}
        for batch in session.batches(micro_batch=4):
            losses = torch.rand(batch.labels.shape) * batch.loss_mask
            # Padding counts nowhere, whatever the reference says of it.
            reference = torch.rand(batch.labels.shape) - 2.0 * ~batch.loss_mask
            if batch.step < 2 or batch.first_of_step:
                session.record_losses(losses, batch, reference=reference)
            else:
                session.record_losses(losses, batch)
            if batch.step < 2:
                excess = (losses - reference).clamp_min(0) * batch.loss_mask
                for row, domain in enumerate(batch.domain_ids.tolist()):
                    expected[batch.step, domain] += excess[row].sum().item()
            if batch.last_of_step:
                if session.validation_due(batch.step):
                    session.record_validation(evaluation)
                session.end_step()
                if batch.step == 2:
                    break
        assert session._reporter.flush(timeout_s=10)
    first, second, third = run.controller.reports
    np.testing.assert_allclose(first.excess_sum, expected[0], rtol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(second.excess_sum, expected[1], rtol=1e-5)  # type: ignore[arg-type]
    assert first.validation_loss is not None
    assert first.validation_loss.tolist() == [3.0, 2.0, 1.0]
    assert second.validation_loss is None
    # Not all of its micro-batches had a reference.
    assert third.excess_sum is None
    assert third.validation_loss is not None


def test_an_evaluation_that_is_none_is_refused(run: FakeRun) -> None:
    with connect(run) as session:
        with pytest.raises(ValueError, match="a loss of each of the run's domains"):
            session.record_validation({"domain-0": 1.0})
        with pytest.raises(ValueError, match="finite and not negative"):
            session.record_validation({f"domain-{index}": float("nan") for index in range(3)})


def test_training_goes_on_when_the_controller_hangs_and_lost_reports_are_counted() -> None:
    with FakeRun(make_spec(num_steps=CAPACITY + 200)).serving() as run:
        run.controller.hang_reports = True
        with connect(run) as session:
            assert len(train(session, micro_batch=12)) == CAPACITY + 200
            assert session.reports_sent == 0
            # Others wait, or are in the call that hangs.
            assert session.reports_dropped >= 200 - MOST_IN_A_CALL
            session._reporter.close(timeout_s=0.0)
        assert session.reports_dropped >= CAPACITY + 200 - MOST_IN_A_CALL


def test_the_delivery_log_has_a_line_for_each_sequence_and_survives_a_torn_one(
    run: FakeRun, tmp_path: Path
) -> None:
    with connect(run, rank=1, world_size=2, delivery_log=tmp_path) as session:
        train(session, until=2)
    path = tmp_path / "received.rank1.jsonl"
    with path.open("ab") as file:
        file.write(b'{"generation": 1, "st')
    run.controller.generation = 2
    with connect(run, rank=1, world_size=2, delivery_log=tmp_path) as session:
        train(session, until=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["generation"], line["step"], line["slot"]) for line in lines] == [
        (generation, step, slot)
        for generation, step in [(1, 0), (1, 1), (2, 0)]
        for slot in range(6, 12)
    ]
    assert lines[7] == {
        "generation": 1,
        "step": 1,
        "slot": 7,
        "lane": 2,
        "domain": domain_of(run.spec, 1, 7),
        "epoch": 0,
        "window": 1,
        "sequence": 7,
        "num_tokens": num_tokens_of(run.spec, 1, 7),
        "sha256": hashlib.sha256(sequence(run.spec, 1, 7).astype("<u2").tobytes()).hexdigest(),
    }


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
