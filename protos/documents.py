"""Where documents begin within sequences, as workers send it and trainers take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DocumentStarts:
    """Where documents begin in some sequences, beside each sequence's own start.

    The last of a sequence's `sequence_length + 1` tokens is a label only, yet a document may begin
    there.
    """

    counts: NDArray[np.int64]
    """[sequences]: how many of `positions` each sequence has."""

    positions: NDArray[np.int64]
    """[sum of counts]: places in their sequence, 1 or more, rising within each sequence."""

    def __post_init__(self) -> None:
        counts, positions = self.counts, self.positions
        if np.any(counts < 0) or counts.sum() != len(positions):
            raise ValueError(
                f"the documents of {len(counts)} sequences must be as many as were counted, got "
                f"{len(positions)} for {counts.sum()}"
            )
        before = np.zeros_like(positions)
        before[1:] = positions[:-1]
        ends = np.cumsum(counts)
        before[(ends - counts)[counts > 0]] = 0
        if np.any(positions <= before):
            raise ValueError("documents must begin after a sequence's start, each after the last")

    @classmethod
    def of(cls, sequences: Sequence[NDArray[np.int64]]) -> DocumentStarts:
        """Put the positions in each sequence together."""
        counts = np.array([len(each) for each in sequences], dtype=np.int64)
        none = np.empty(0, dtype=np.int64)
        return cls(counts=counts, positions=np.concatenate([none, *sequences]))

    @classmethod
    def join(cls, parts: Sequence[DocumentStarts]) -> DocumentStarts:
        """Put sequences after one another."""
        return cls(
            counts=np.concatenate([part.counts for part in parts]),
            positions=np.concatenate([part.positions for part in parts]),
        )

    def of_rows(self, rows: slice) -> DocumentStarts:
        """Return those of some consecutive sequences."""
        ends = np.cumsum(self.counts)
        counts = self.counts[rows]
        end = int(ends[rows][-1]) if len(counts) else 0
        return DocumentStarts(
            counts=counts, positions=self.positions[end - int(counts.sum()) : end]
        )

    def sequences(self) -> NDArray[np.int64]:
        """Return [positions]: which sequence each position is in."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def check_within(self, num_tokens: NDArray[np.uint32]) -> None:
        """Hold the positions against [sequences] numbers of tokens that are not padding.

        Raises:
            ValueError: there are more or fewer sequences, or a document begins in the padding.
        """
        if len(self.counts) != len(num_tokens):
            raise ValueError(
                f"{len(num_tokens)} sequences came with the documents of {len(self.counts)}"
            )
        if np.any(self.positions >= np.repeat(num_tokens, self.counts)):
            raise ValueError("a document must begin before its sequence's padding")


def starts_dtype(sequence_length: int) -> np.dtype[Any]:
    """Return what positions and counts travel as: neither is above `sequence_length`."""
    return np.dtype("<u2") if sequence_length < 1 << 16 else np.dtype("<u4")
