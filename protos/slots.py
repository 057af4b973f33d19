"""Which slot of a step's global batch holds which domain, and which rank consumes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protos.keyed import raw_uint64, raw_uint64_many
from protos.types import Lane, Step


def deal(counts: NDArray[np.int64], *, lanes: int, seed: int, step: Step) -> NDArray[np.uint16]:
    """Deal a step's domain labels; return [lanes, slots_per_lane] domain ids in slot order.

    See `deal_steps`.
    """
    dealt: NDArray[np.uint16] = deal_steps(counts[None], lanes=lanes, seed=seed, step=step)[0]
    return dealt


def deal_steps(
    counts: NDArray[np.int64], *, lanes: int, seed: int, step: Step
) -> NDArray[np.uint16]:
    """Deal the labels of consecutive steps; return [steps, lanes, slots_per_lane] domain ids.

    The labels lie in a row, domain after domain, and go round the lanes in turn, so that any two
    lanes' counts of a domain differ by at most one. The lane that gets the first label is drawn
    anew in each step: else the same lanes would always get the odd ones and run through a small
    domain faster than the others.

    Args:
        counts: [steps, domains], each step's adding up to the same number of slots.
        lanes: how many there are.
        seed: the run's.
        step: the first of the steps.

    Raises:
        ValueError: if `lanes` does not divide the number of slots.
    """
    num_steps, num_domains = counts.shape
    num_slots = int(counts[0].sum())
    if num_slots % lanes:
        raise ValueError(f"slots must be a multiple of lanes, got {num_slots} and {lanes}")
    width = num_slots // lanes
    domains = np.tile(np.arange(num_domains, dtype=np.uint16), num_steps)
    labels = np.repeat(domains, counts.ravel()).reshape(num_steps, width, lanes)
    steps = range(step, step + num_steps)
    first_lanes = raw_uint64_many(1, seed, "deal", tails=[(each,) for each in steps])
    keys = [(each, lane) for each in steps for lane in range(lanes)]
    order = np.argsort(raw_uint64_many(width, seed, "slots", tails=keys), axis=1, kind="stable")
    turns = (np.arange(lanes) - (first_lanes % np.uint64(lanes)).astype(np.int64)) % lanes
    dealt: NDArray[np.uint16] = labels[
        np.arange(num_steps)[:, None, None],
        order.reshape(num_steps, lanes, width),
        turns[:, :, None],
    ]
    return dealt


def lane_counts(
    counts: NDArray[np.int64], *, lanes: int, seed: int, step: Step
) -> NDArray[np.int64]:
    """Return [lanes, domains]: how many sequences of each domain each lane gets in a step."""
    turn = np.arange(lanes, dtype=np.int64)
    ends = np.cumsum(counts)
    starts = ends - counts
    # Labels i of 0..total-1 go to turn i mod lanes: count multiples in [start, end).
    by_turn = (ends[None, :] - turn[:, None] + lanes - 1) // lanes
    by_turn -= (starts[None, :] - turn[:, None] + lanes - 1) // lanes
    first_lane = int(raw_uint64(1, seed, "deal", step)[0] % np.uint64(lanes))
    return np.roll(by_turn, first_lane, axis=0)


def rank_slots(rank: int, *, world_size: int, global_sequences: int) -> range:
    """Return the slots that a rank consumes; ranks differ by one slot where they must."""
    first = rank * global_sequences // world_size
    end = (rank + 1) * global_sequences // world_size
    return range(first, end)


def lanes_of(slots: range, *, slots_per_lane: int) -> list[Lane]:
    """Return the lanes that a range of slots touches, in order."""
    if not slots:
        return []
    first, last = slots[0] // slots_per_lane, slots[-1] // slots_per_lane
    return [Lane(lane) for lane in range(first, last + 1)]
