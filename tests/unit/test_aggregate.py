"""Reports added up to what a policy is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from controller.aggregate import MAX_DEGRADED_STEPS_AHEAD, Aggregator, add_up, cursors_after
from protos.errors import InvalidMessage
from protos.types import Generation, Mixture, Step, StepReport
from tests.fakes_controller import Clock, make_report
from tests.unit.test_membership import SPEC


def _summed_parts(reports: list[StepReport]) -> NDArray[np.float64]:
    parts = [report.alignment_part for report in reports if report.alignment_part is not None]
    return np.asarray(np.sum(parts, axis=0))


PLANNED = Mixture.from_shares((2, 1, 1))


def _reports(world_size: int, **more: Any) -> list[StepReport]:
    return [make_report(SPEC, rank=r, world_size=world_size, **more) for r in range(world_size)]


def test_sums_are_over_ranks_and_losses_are_a_token() -> None:
    reports = _reports(2)
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=2)
    np.testing.assert_array_equal(seen.tokens, reports[0].tokens + reports[1].tokens)
    np.testing.assert_allclose(seen.loss, (reports[0].loss_sum + reports[1].loss_sum) / seen.tokens)
    assert seen.planned.tolist() == [0.5, 0.25, 0.25]
    assert seen.num_missing_ranks == 0


def test_parts_of_the_alignment_add_up_to_the_whole() -> None:
    reports = _reports(4)
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=4)
    np.testing.assert_array_equal(seen.alignment, _summed_parts(reports))


def test_a_missing_part_is_made_up_for_by_the_share_that_arrived() -> None:
    reports = _reports(4)[1:]
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=4)
    assert seen.alignment is not None
    np.testing.assert_allclose(seen.alignment, _summed_parts(reports) / 0.75)
    assert seen.num_missing_ranks == 1


def test_no_part_at_all_is_not_measured() -> None:
    reports = _reports(2, alignment_part=None, weight_norms=(), update_norms=())
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=2)
    assert seen.alignment is None
    assert seen.weight_norms.shape == (0,)


def test_norms_are_averaged_over_the_ranks_that_sent_them() -> None:
    norms: list[tuple[float, ...]] = [(1.0, 4.0), (), (3.0, 0.0)]
    reports = [
        make_report(SPEC, rank=rank, world_size=3, weight_norms=sent)
        for rank, sent in enumerate(norms)
    ]
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=3)
    assert seen.weight_norms.tolist() == [2.0, 2.0]


def _measured(rank: int) -> dict[str, Any]:
    return {
        "excess_sum": np.array([1.0, 0.5, 0.0]) + rank,
        "part_square_norms": np.array([4.0, 1.0, 0.25]) * (rank + 1),
        "num_parts": np.array([2, 1, 0]),
    }


def test_what_only_some_policies_need_adds_up_and_evaluations_are_averaged() -> None:
    reports = [make_report(SPEC, rank=rank, world_size=2, **_measured(rank)) for rank in range(2)]
    reports[1] = replace(reports[1], validation_loss=np.array([3.0, 2.0, 1.0]))
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=2)
    assert seen.excess_sum is not None
    assert seen.part_square_norms is not None
    assert seen.num_parts is not None
    assert seen.validation_loss is not None
    assert seen.excess_sum.tolist() == [3.0, 2.0, 1.0]
    assert seen.part_square_norms.tolist() == [12.0, 3.0, 0.75]
    assert seen.num_parts.tolist() == [4, 2, 0]
    # One rank is enough for an evaluation; of several the mean counts.
    assert seen.validation_loss.tolist() == [3.0, 2.0, 1.0]
    reports[0] = replace(reports[0], validation_loss=np.array([1.0, 2.0, 3.0]))
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=2)
    assert seen.validation_loss is not None
    assert seen.validation_loss.tolist() == [2.0, 2.0, 2.0]


def test_sums_that_a_rank_has_not_measured_are_not_known() -> None:
    reports = [make_report(SPEC, rank=0, world_size=2, **_measured(0)), _reports(2)[1]]
    seen = add_up(reports, SPEC, step=Step(0), planned=PLANNED, world_size=2)
    assert seen.excess_sum is None
    assert seen.part_square_norms is None
    assert seen.num_parts is None
    # A report that did not come at all is missing from the tokens, too.
    seen = add_up(reports[:1], SPEC, step=Step(0), planned=PLANNED, world_size=2)
    assert seen.excess_sum is not None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"validation_loss": np.ones(2)}, r"validation_loss must have the shape \(3,\), got"),
        ({"validation_loss": np.array([1, np.nan, 1])}, "validation_loss must be finite"),
        ({"validation_loss": np.array([1, -1.0, 1])}, "validation_loss must not be negative"),
        ({"excess_sum": np.array([1, np.inf, 1])}, "excess_sum must be finite"),
        ({"excess_sum": np.array([1, -0.5, 1])}, "excess_sum must not be negative"),
        ({"part_square_norms": np.ones(3)}, "must come together"),
        ({"num_parts": np.array([1, 1, 1])}, "must come together"),
        (
            {"part_square_norms": -np.ones(3), "num_parts": np.array([1, 1, 1])},
            "part_square_norms must not be negative",
        ),
        (
            {"part_square_norms": np.ones(3), "num_parts": np.array([99, 1, 1])},
            "num_parts .* are more than sequences",
        ),
    ],
)
def test_what_cannot_be_right_of_these_is_refused(fields: dict[str, Any], sentence: str) -> None:
    group = _aggregator(Clock())
    with pytest.raises(InvalidMessage, match=sentence):
        group.add(make_report(SPEC, world_size=2, step=5, **fields), sealed_through=6)
    assert group.first_reported() is None


def test_places_of_all_lanes_come_from_their_ranks() -> None:
    assert sorted(cursors_after(_reports(3))) == [0, 1, 2, 3]


def _aggregator(clock: Clock) -> Aggregator:
    return Aggregator(SPEC, generation=Generation(1), world_size=2, first_step=Step(5), now=clock)


def test_norms_of_two_lengths_name_both_ranks() -> None:
    group = _aggregator(Clock())
    group.add(make_report(SPEC, rank=0, world_size=2, step=5), sealed_through=6)
    other = make_report(SPEC, rank=1, world_size=2, step=5, weight_norms=(1.0,))
    with pytest.raises(InvalidMessage, match="rank 1, step 5: weight_norms has 1 .* rank 0 sent 2"):
        group.add(other, sealed_through=6)


def test_only_a_degraded_step_may_lie_beyond_the_seal_and_not_without_end() -> None:
    group = _aggregator(Clock())
    far: dict[str, Any] = {"rank": 0, "world_size": 2, "degraded": True}
    assert group.add(make_report(SPEC, step=50, **far), sealed_through=6)
    with pytest.raises(InvalidMessage, match="future"):
        group.add(make_report(SPEC, step=7 + MAX_DEGRADED_STEPS_AHEAD, **far), sealed_through=6)


def test_steps_close_in_order_and_what_is_closed_is_late() -> None:
    clock = Clock()
    group = _aggregator(clock)
    for step, rank in ((6, 0), (5, 1), (6, 1), (5, 0)):
        assert not group.is_complete()
        group.add(make_report(SPEC, rank=rank, world_size=2, step=step), sealed_through=6)
    assert group.is_complete()
    assert [report.rank for report in group.close()] == [0, 1]
    assert group.is_complete()
    assert not group.add(make_report(SPEC, world_size=2, step=5), sealed_through=6)
    group.close()
    assert group.first_reported() is None
    assert group.waiting_since_s() is None
    group.skip_to(Step(9))
    assert group.next_step == 9
