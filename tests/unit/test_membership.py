"""The barrier of Join: who waits for whom, and what ends the wait."""

from __future__ import annotations

import numpy as np
import pytest

from controller.membership import JoinBarrier, joined_cursors, timed_out
from protos.errors import Disagreement, HeadraceError, InvalidMessage, WrongRun
from protos.spec import RunSpec
from protos.types import JoinRequest, Lane, Resume, Step
from tests.fakes_controller import join_request, places_after, resume_at

SPEC = RunSpec(
    run_id="small",
    seed=1,
    domains=("web", "code", "books"),
    lanes=4,
    global_sequences=8,
    sequence_length=16,
    window_samples=8,
    interleave=2,
    num_steps=10,
    lag=2,
    vocab_size=300,
    eot_id=0,
    text_field="text",
    index_sha256="i",
    tokenizer_sha256="t",
    degraded_after_s=10,
    data_timeout_s=90,
)


def test_a_gathering_starts_once_when_all_ranks_are_there() -> None:
    barrier = JoinBarrier(SPEC)
    gathering = barrier.offer(join_request(1, 2))
    assert gathering.missing() == [0]
    assert not barrier.starting(gathering)
    assert barrier.offer(join_request(0, 2)) is gathering
    assert barrier.starting(gathering)
    assert not barrier.starting(gathering)


def test_a_rank_that_asks_again_waits_for_the_same() -> None:
    barrier = JoinBarrier(SPEC)
    gathering = barrier.offer(join_request(0, 2))
    assert barrier.offer(join_request(0, 2)) is gathering
    barrier.offer(join_request(1, 2))
    assert barrier.starting(gathering)
    assert barrier.offer(join_request(0, 2)) is gathering


def test_a_new_process_of_a_rank_after_the_start_begins_a_new_gathering() -> None:
    barrier = JoinBarrier(SPEC)
    gathering = barrier.offer(join_request(0, 1))
    assert barrier.starting(gathering)
    assert barrier.offer(join_request(0, 1, attempt="b")) is not gathering


def test_a_new_process_takes_the_place_of_the_old_one() -> None:
    barrier = JoinBarrier(SPEC)
    old = join_request(0, 2)
    gathering = barrier.offer(old)
    barrier.offer(join_request(0, 3, attempt="b"))
    barrier.withdraw(gathering, old)
    assert gathering.requests[old.rank].attempt_id == "b-0"
    assert gathering.missing() == [1, 2]


def test_a_rank_that_has_gone_is_missed() -> None:
    barrier = JoinBarrier(SPEC)
    request = join_request(0, 2)
    gathering = barrier.offer(request)
    barrier.withdraw(gathering, request)
    assert not gathering.requests
    assert barrier.offer(join_request(1, 3)) is gathering


@pytest.mark.parametrize(
    ("one", "other", "values"),
    [
        (join_request(0, 2), join_request(1, 3), "world_size: 2 and 3"),
        (
            join_request(0, 2, resume=resume_at(50, SPEC)),
            join_request(1, 2, resume=resume_at(40, SPEC)),
            "resume.step: 50 and 40",
        ),
        (join_request(0, 2, resume=resume_at(50, SPEC)), join_request(1, 2), "50 and 0"),
    ],
)
def test_ranks_that_disagree_end_the_wait_of_all_with_both_values(
    one: JoinRequest, other: JoinRequest, values: str
) -> None:
    barrier = JoinBarrier(SPEC)
    told: list[str] = []
    gathering = barrier.offer(one)
    gathering.on_end.append(lambda: told.append("ended"))
    with pytest.raises(Disagreement, match=f"ranks 0 and 1 differ in .*{values}"):
        barrier.offer(other)
    assert isinstance(gathering.outcome, Disagreement)
    assert told == ["ended"]
    assert barrier.gathering is not gathering


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (join_request(1, 2, global_sequences=16), Disagreement, "rank 1 expects .* = 16, .* 8"),
        (join_request(1, 2, sequence_length=99), Disagreement, "sequence_length = 99.* 16"),
        (
            join_request(1, 2, resume=Resume(order_sha256="f" * 64, step=Step(5), cursors={})),
            Disagreement,
            "order ffffffffffff",
        ),
        (join_request(1, 9), Disagreement, "9 ranks"),
    ],
)
def test_a_rank_that_differs_from_the_run_ends_the_wait_of_all(
    request_: JoinRequest, error: type[HeadraceError], message: str
) -> None:
    barrier = JoinBarrier(SPEC)
    gathering = barrier.offer(join_request(0, 2))
    with pytest.raises(error, match=message):
        barrier.offer(request_)
    assert isinstance(gathering.outcome, error)


def test_a_rank_of_another_run_is_sent_away_and_the_others_wait_on() -> None:
    barrier = JoinBarrier(SPEC)
    gathering = barrier.offer(join_request(0, 2))
    with pytest.raises(WrongRun, match="'large'.*'small'"):
        barrier.offer(join_request(1, 2, run_id="large"))
    wrong = {Lane(0): np.zeros((2, 3), dtype=np.uint32)}
    with pytest.raises(InvalidMessage, match="lane 0"):
        barrier.offer(join_request(1, 2, resume=resume_at(3, SPEC, cursors=wrong)))
    assert gathering.outcome is None


def test_a_timeout_names_the_ranks_that_have_not_come() -> None:
    barrier = JoinBarrier(SPEC)
    request = join_request(1, 4)
    gathering = barrier.offer(request)
    barrier.offer(join_request(2, 4))
    assert "did not join: 0, 3;" in str(timed_out(gathering, request))


def test_cursors_come_from_checkpoints_then_the_ledger_then_the_start() -> None:
    barrier = JoinBarrier(SPEC)
    own = places_after(49, SPEC)
    held = {Lane(0): own[Lane(0)]}
    gathering = barrier.offer(join_request(0, 1, resume=resume_at(50, SPEC, cursors=held)))
    known = {Lane(lane): (Step(48), places_after(47, SPEC)[Lane(lane)]) for lane in (0, 1)}
    cursors, steps = joined_cursors(gathering, known, SPEC)
    assert steps == {0: 50, 1: 48, 2: 0, 3: 0}
    np.testing.assert_array_equal(cursors[Lane(0)], own[Lane(0)])
    np.testing.assert_array_equal(cursors[Lane(1)], known[Lane(1)][1])
    assert not cursors[Lane(2)].any()


def test_ranks_that_hold_different_places_of_a_lane_disagree() -> None:
    barrier = JoinBarrier(SPEC)
    for rank in range(2):
        cursors = {Lane(1): places_after(3 + rank, SPEC)[Lane(1)]}
        gathering = barrier.offer(join_request(rank, 2, resume=resume_at(4, SPEC, cursors=cursors)))
    with pytest.raises(Disagreement, match="rank 0 resumes lane 1 .* rank 1"):
        joined_cursors(gathering, {}, SPEC)
