"""Which samples a lane reads in which order: pure functions of seed, index, lanes and position.

For a domain and an epoch the shards are permuted and their samples numbered in that order; a lane
owns a contiguous range of the numbers, cut into `interleave` parts; a window takes the next
`window_samples / interleave` samples of each part and permutes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from protos.keyed import permutation


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderKey:
    """What the order of a lane in a domain depends on, the number of samples excepted."""

    seed: int
    domain: str
    lane: int
    lanes: int
    window_samples: int
    interleave: int


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class WindowSamples:
    """The samples of a window, in the order in which their documents are joined."""

    shards: NDArray[np.int64]
    """[samples]: position of each sample's shard in the index's list of the domain."""

    samples: NDArray[np.int64]
    """[samples]: position of each sample in its shard."""


class NumberedShards:
    """The shards of a domain in an epoch's order, and the numbers of their samples."""

    def __init__(
        self, seed: int, domain: str, epoch: int, *, shard_samples: NDArray[np.int64]
    ) -> None:
        self.shards = permutation(len(shard_samples), seed, "shards", domain, epoch)
        sizes = shard_samples[self.shards]
        self.starts = np.cumsum(sizes) - sizes
        self.num_samples = int(sizes.sum())


class EpochOrder:
    """The order of one lane in one epoch of one domain."""

    def __init__(self, key: OrderKey, *, epoch: int, numbered: NumberedShards) -> None:
        self._key = key
        self._epoch = epoch
        self._numbered = numbered
        self.first = key.lane * numbered.num_samples // key.lanes
        self.end = (key.lane + 1) * numbered.num_samples // key.lanes
        size, parts = self.end - self.first, key.interleave
        self._part_starts = [self.first + part * size // parts for part in range(parts + 1)]

    @property
    def num_windows(self) -> int:
        """How many windows the lane has in this epoch."""
        starts = self._part_starts
        longest = max(end - start for start, end in pairwise(starts))
        return -(-longest // self._part_samples)

    def window(self, window: int) -> WindowSamples:
        """Return the samples of a window."""
        ranges = [
            np.arange(
                start + window * self._part_samples,
                min(start + (window + 1) * self._part_samples, end),
                dtype=np.int64,
            )
            for start, end in pairwise(self._part_starts)
        ]
        numbers = np.concatenate(ranges)
        key = self._key
        shuffled = numbers[
            permutation(
                len(numbers), key.seed, "samples", key.domain, self._epoch, key.lane, window
            )
        ]
        # Empty shards share their start with the next one: the last of them holds the sample.
        starts = self._numbered.starts
        ordinal = np.searchsorted(starts, shuffled, side="right") - 1
        return WindowSamples(
            shards=self._numbered.shards[ordinal], samples=shuffled - starts[ordinal]
        )

    def sequence_order(self, window: int, num_sequences: int) -> NDArray[np.int64]:
        """Return in which order the sequences cut from a window are delivered."""
        key = self._key
        return permutation(
            num_sequences, key.seed, "sequences", key.domain, self._epoch, key.lane, window
        )

    @property
    def _part_samples(self) -> int:
        return self._key.window_samples // self._key.interleave


def num_sequences(num_tokens: int, *, sequence_length: int) -> int:
    """Return how many sequences a window's joined tokens give.

    Each sequence trains on `sequence_length` tokens and holds one more, the first, which is also
    the last of the sequence before; a lone token makes a sequence that trains on nothing.
    """
    if num_tokens == 0:
        return 0
    return max(1, -(-(num_tokens - 1) // sequence_length))
