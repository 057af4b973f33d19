"""When a step may be composed: sealed, or the controller is silent and a rank waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from controller.history import plan_from
from loader_workers.plans import PlanBoard, Turn
from loader_workers.service import check_opening
from protos.dataset_index import DatasetIndex, ShardRef
from protos.errors import InvalidMessage, NotReady, StaleGeneration
from protos.planbook import PlanBook
from protos.slots import lane_counts
from protos.types import Generation, Lane, OpenStream, PlanEvent, Rank, Step
from tests.fakes_loader import make_spec, scripted_plans

INDEX = DatasetIndex(
    ShardRef(domain=name, url=name, num_bytes=1, num_samples=9, text_bytes=1, sha256="0" * 64)
    for name in ("web", "code")
)
SPEC = make_spec(INDEX, degraded_after_s=10.0)
PLANS = scripted_plans(SPEC, {0: [0.3, 0.7], 5: [0.8, 0.2]})


class _Board(PlanBoard):
    """A board on a clock that tests turn."""

    def __init__(self) -> None:
        self.clock = 0.0
        super().__init__(SPEC, now=lambda: self.clock)

    def say(
        self,
        plans: Sequence[object] = (),
        *,
        sealed_through: int,
        generation: int = 1,
        reset: bool = False,
        epoch: int = 0,
        asked: int = 0,
    ) -> None:
        self.hear(
            PlanEvent(
                epoch=epoch,
                asked=asked,
                generation=Generation(generation),
                plans=tuple(plans),  # type: ignore[arg-type]
                sealed_through=sealed_through,
                reset=reset,
            )
        )

    def turn(
        self,
        step: int,
        *,
        needed_step: int = -1,
        generation: int = 1,
        credits: int = 1,
        most_steps: int = 1,
        lanes: Sequence[int] = (),
    ) -> Turn:
        """Return the turn of a step that may be composed now."""
        found = self.wait_turn(
            Step(step),
            Generation(generation),
            may_send=lambda: credits,
            needed_step=lambda: needed_step,
            lanes=[Lane(lane) for lane in lanes],
            most_steps=most_steps,
        )
        assert found is not None
        return found

    def would_wait(self, step: int, *, needed_step: int = -1, credit: bool = True) -> bool:
        """Say whether the stream of a step has to wait; then its rank goes away."""
        asked = 0

        def may_send() -> bool | None:
            nonlocal asked
            asked += 1
            # The board asks anew after each wait.
            return credit if asked == 1 else None

        waker = threading.Timer(0.05, self._wake)
        waker.start()
        found = self.wait_turn(
            Step(step), Generation(1), may_send=may_send, needed_step=lambda: needed_step
        )
        waker.join()
        return found is None

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()


def _begun(sealed_through: int = 1) -> _Board:
    board = _Board()
    board.say(PLANS[:1], sealed_through=sealed_through, reset=True)
    return board


def test_a_sealed_step_has_its_turn_with_the_plan_in_force() -> None:
    board = _begun()
    board.say(PLANS[1:], sealed_through=6)
    assert [board.turn(step).plan_version for step in (4, 5, 6)] == [1, 2, 2]
    assert board.turn(4).shares == pytest.approx((0.3, 0.7))
    assert board.turn(5).shares == pytest.approx((0.8, 0.2))
    assert int(board.turn(5).counts.sum()) == SPEC.global_sequences
    assert board.would_wait(7)


@pytest.mark.parametrize(
    ("step", "credits", "most_steps", "num_steps"),
    [
        (0, 9, 9, 5),  # then comes another plan
        (5, 9, 9, 3),  # then nothing is sealed
        (5, 2, 9, 2),  # the credits end
        (5, 9, 1, 1),
        (7, 9, 9, 1),
    ],
)
def test_steps_have_their_turn_together_as_far_as_seal_plan_and_credits_go(
    step: int, credits: int, most_steps: int, num_steps: int
) -> None:
    board = _begun()
    board.say(PLANS[1:], sealed_through=7)
    turn = board.turn(step, credits=credits, most_steps=most_steps)
    assert len(turn.counts) == num_steps
    assert board.composed_through == step + num_steps - 1
    for index in range(num_steps):
        alone = board.turn(step + index)
        assert alone.counts.tolist() == [turn.counts[index].tolist()]
        assert alone.plan_version == turn.plan_version


def test_a_degraded_step_has_its_turn_alone() -> None:
    board = _begun()
    board.clock = 11.0
    turn = board.turn(2, needed_step=2, credits=9, most_steps=9)
    assert (turn.degraded, len(turn.counts)) == (True, 1)
    assert board.num_degraded == 1


def test_an_unsealed_step_waits_while_the_controller_speaks() -> None:
    board = _begun()
    for _ in range(5):
        board.clock += 9.0
        assert board.would_wait(2, needed_step=2)
        board.say(sealed_through=1)


def test_silence_alone_composes_nothing_that_no_rank_waits_for() -> None:
    board = _begun()
    board.clock = 11.0
    assert board.would_wait(2)
    assert board.would_wait(2, needed_step=1)
    assert board.would_wait(2, needed_step=2, credit=False)
    turn = board.turn(2, needed_step=2)
    assert (turn.degraded, turn.plan_version, board.num_degraded) == (True, 1, 1)


def test_a_step_is_said_to_be_composed_as_soon_as_it_has_its_turn() -> None:
    board = _begun()
    board.turn(0)
    assert board.composed_through == 0
    board.clock = 11.0
    board.turn(2, needed_step=2)
    board.turn(2, needed_step=2)
    assert (board.composed_through, board.num_degraded) == (2, 1)
    board.say(PLANS, sealed_through=1, generation=2, reset=True)
    assert board.composed_through == -1


def test_the_plans_of_an_older_generation_are_ignored() -> None:
    board = _begun()
    board.say(PLANS, sealed_through=3, generation=4, reset=True)
    board.say(PLANS[:1], sealed_through=99, generation=3, reset=True)
    assert (board.generation, board.sealed_through) == (4, 3)
    with pytest.raises(StaleGeneration, match="generation 1 has ended, 4 is the newest"):
        board.turn(0)


def test_plans_of_a_generation_whose_start_was_missed_are_not_used() -> None:
    board = _begun()
    board.say(PLANS[1:], sealed_through=9, generation=2)
    assert (board.generation, board.sealed_through) == (1, 1)


def test_a_plan_that_does_not_follow_from_those_held_is_refused() -> None:
    other = scripted_plans(SPEC, {0: [0.5, 0.5], 5: [0.8, 0.2]})
    assert other[1].carry_q32 != PLANS[1].carry_q32
    with pytest.raises(InvalidMessage, match="the plans before it lead to"):
        _begun().say(other[1:], sealed_through=5)


def test_closing_sends_away_all_who_wait() -> None:
    board = _begun()
    threading.Timer(0.05, board.close).start()
    with pytest.raises(NotReady, match="stopping"):
        board.turn(9)
    with pytest.raises(NotReady, match="stopping"):
        board.wait_generation(Generation(7))


def test_what_lanes_used_between_two_steps_is_the_sum_of_their_counts() -> None:
    board = _begun(sealed_through=9)
    board.say(PLANS[1:], sealed_through=9)
    starts = {Lane(0): Step(3), Lane(2): Step(6), Lane(3): Step(8)}
    totals = board.lane_totals(starts, Step(8))
    for lane, start in starts.items():
        expected = sum(
            (
                lane_counts(board.turn(step).counts[0], lanes=4, seed=SPEC.seed, step=Step(step))[
                    lane
                ]
                for step in range(start, 8)
            ),
            np.zeros(2, np.int64),
        )
        np.testing.assert_array_equal(totals[lane], expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cursors": {}, "cursor_steps": {}}, "there must be at least one lane"),
        ({"credits": -1}, "neither number may be negative"),
        ({"cursor_steps": {}}, "each cursor needs its step"),
        ({"first_slot": 8, "end_slot": 8}, r"slots \[8, 8\); a step has 16"),
        ({"cursors": {9: np.zeros((2, 3))}, "cursor_steps": {9: 0}}, "lane 9 of 4 has none"),
        ({"cursors": {0: np.zeros((3, 3))}}, r"lane 0 has the shape \(3, 3\); the run has 2"),
        ({"cursor_steps": {0: 8}}, "stands at step 8, after step 7 that rank 0 asks for"),
    ],
)
def test_an_opening_that_cannot_be_is_refused(changes: dict[str, object], sentence: str) -> None:
    values: dict[str, object] = {
        "run_id": SPEC.run_id,
        "generation": Generation(1),
        "rank": Rank(0),
        "from_step": Step(7),
        "first_slot": 0,
        "end_slot": 8,
        "cursors": {Lane(0): np.zeros((2, 3), np.uint32)},
        "cursor_steps": {Lane(0): Step(7)},
        "credits": 2,
    }
    check_opening(OpenStream(**values), SPEC)  # type: ignore[arg-type]
    with pytest.raises(InvalidMessage, match=sentence):
        check_opening(OpenStream(**{**values, **changes}), SPEC)  # type: ignore[arg-type]


def test_the_plans_before_those_that_a_restarted_controller_tells_are_kept() -> None:
    board = _begun(9)
    board.say(PLANS[1:], sealed_through=9)
    lanes = {Lane(0): Step(2), Lane(3): Step(7)}
    wanted = board.lane_totals(lanes, Step(9))
    book = PlanBook(global_sequences=SPEC.global_sequences)
    for plan in PLANS:
        book.add(plan)
    for first in (3, 7):
        # As if the plan in force began where the hindmost lane stands.
        told = plan_from(book, Step(first))
        later = [plan for plan in PLANS if plan.first_step > first]
        board.say([told, *later], sealed_through=9, reset=True)
        got = board.lane_totals(lanes, Step(9))
        for lane in lanes:
            np.testing.assert_array_equal(got[lane], wanted[lane])
    # Plans that those held do not lead to take their place, all of them.
    other = scripted_plans(SPEC, {0: [0.5, 0.5], 8: [0.1, 0.9]})
    board.say(other[1:], sealed_through=9, reset=True)
    with pytest.raises(InvalidMessage, match="no plan for step 2"):
        board.lane_totals(lanes, Step(9))


def test_what_a_controller_says_whose_place_another_has_taken_is_ignored() -> None:
    board = _begun(3)
    board.hear(
        PlanEvent(generation=Generation(1), plans=(), sealed_through=4, epoch=2),
    )
    board.hear(
        PlanEvent(generation=Generation(2), plans=PLANS[:1], sealed_through=8, reset=True, epoch=1)
    )
    assert (board.generation, board.sealed_through) == (1, 4)


def _gone_alone() -> _Board:
    """Return a board that gave one stream steps 4 to 6 without a seal, under plan 1."""
    board = _begun(3)
    board.clock = 10.0
    for step in (4, 5, 6):
        assert board.turn(step, needed_step=step, lanes=[0]).degraded
    return board


def test_a_step_composed_alone_is_the_same_for_every_stream_whatever_is_heard_meanwhile() -> None:
    board = _gone_alone()
    first = board.turn(5, needed_step=5, lanes=[0])
    board.say(PLANS[1:], sealed_through=9)
    again = board.turn(5, lanes=[1])
    assert (again.plan_version, again.degraded) == (1, True)
    np.testing.assert_array_equal(again.counts, first.counts)
    late = board.turn(3, lanes=[1], credits=9, most_steps=9)
    assert len(late.counts) == 1, "sealed steps end where those composed alone begin"
    assert (board.turn(7).plan_version, board.turn(7).degraded) == (2, False)
    counts = np.sum([board.turn(step).counts[0] for step in (4, 5, 6)], axis=0)
    wound = sum(board.lane_totals({Lane(lane): Step(4) for lane in range(4)}, Step(7)).values())
    np.testing.assert_array_equal(wound, counts)


def test_a_worker_says_what_each_lane_got_alone_and_with_which_plan() -> None:
    board = _gone_alone()
    board.turn(4, lanes=[1])
    board.say(PLANS[1:], sealed_through=8)
    board.clock = 20.0
    for lane in (0, 1):
        board.turn(9, needed_step=9, lanes=[lane])
    said = [
        (each.first_step, each.last_step, each.plan_version, each.lanes) for each in board.alone
    ]
    assert said == [(4, 4, 1, (1,)), (4, 6, 1, (0,)), (9, 9, 2, (0, 1))]
    board.say(PLANS, sealed_through=9, generation=2, reset=True)
    assert board.alone == ()


def test_a_worker_that_is_asked_goes_alone_no_further_for_a_while_and_says_that_it_heard() -> None:
    board = _begun(3)
    board.clock = 10.0
    board.say(sealed_through=-1, epoch=4, asked=7)
    assert (board.epoch, board.answered, board.sealed_through) == (4, 7, 3)
    assert board.would_wait(4, needed_step=4)
    board.say(sealed_through=-1, epoch=5, asked=2)
    assert board.answered == 2, "another controller counts its own questions"
