"""The laws of dealing a step's sequences to lanes, slots and ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.slots import deal, deal_steps, lane_counts, lanes_of, rank_slots
from protos.types import Step


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, int, int, Step]:
    lanes = draw(st.integers(1, 16))
    per_lane = draw(st.integers(1, 20))
    cuts = draw(st.lists(st.integers(0, lanes * per_lane), min_size=0, max_size=9))
    edges = [0, *sorted(cuts), lanes * per_lane]
    seed, step = draw(st.integers(0, 2**63)), draw(st.integers(0, 10**9))
    return np.diff(edges).astype(np.int64), lanes, seed, Step(step)


@given(steps())
def test_every_lane_gets_its_even_part_of_every_domain(
    case: tuple[np.ndarray, int, int, Step],
) -> None:
    counts, lanes, seed, step = case
    dealt = deal(counts, lanes=lanes, seed=seed, step=step)
    by_lane = np.stack([np.bincount(lane, minlength=len(counts)) for lane in dealt])
    assert dealt.shape == (lanes, counts.sum() // lanes)
    assert (by_lane.sum(axis=0) == counts).all()
    assert (by_lane.max(axis=0) - by_lane.min(axis=0) <= 1).all()
    assert (by_lane == lane_counts(counts, lanes=lanes, seed=seed, step=step)).all()


@given(steps(), st.integers(1, 9))
def test_steps_dealt_together_are_dealt_as_one_by_one(
    case: tuple[np.ndarray, int, int, Step], num_steps: int
) -> None:
    counts, lanes, seed, step = case
    # Each step has its own counts: the domains change places.
    all_counts = np.stack([np.roll(counts, index) for index in range(num_steps)])
    dealt = deal_steps(all_counts, lanes=lanes, seed=seed, step=step)
    for index in range(num_steps):
        alone = deal(all_counts[index], lanes=lanes, seed=seed, step=Step(step + index))
        assert (dealt[index] == alone).all()


@given(steps())
def test_a_deal_depends_on_its_arguments_alone(case: tuple[np.ndarray, int, int, Step]) -> None:
    counts, lanes, seed, step = case
    first = deal(counts, lanes=lanes, seed=seed, step=step)
    deal(counts, lanes=lanes, seed=seed + 1, step=step)
    assert (first == deal(counts, lanes=lanes, seed=seed, step=step)).all()


def test_no_lane_gets_more_of_a_rare_domain_in_the_long_run() -> None:
    counts = np.array([1, 31])
    total = np.zeros(8)
    for step in range(4000):
        total += lane_counts(counts, lanes=8, seed=5, step=Step(step))[:, 0]
    # 500 expected each; the deviation of a fair draw is 21.
    assert np.abs(total - 500).max() < 5 * 21


def test_lanes_that_do_not_divide_the_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of lanes"):
        deal(np.array([3, 4]), lanes=2, seed=0, step=Step(0))


@settings(max_examples=200)
@given(world_size=st.integers(1, 40), lanes=st.integers(1, 16), per_lane=st.integers(1, 16))
def test_ranks_share_out_all_slots_in_order(world_size: int, lanes: int, per_lane: int) -> None:
    total = lanes * per_lane
    parts = [
        rank_slots(r, world_size=world_size, global_sequences=total) for r in range(world_size)
    ]
    assert [slot for part in parts for slot in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        touched = lanes_of(part, slots_per_lane=per_lane)
        assert sorted({slot // per_lane for slot in part}) == touched
