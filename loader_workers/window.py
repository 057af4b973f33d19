"""A window: the documents of a few thousand samples, joined and cut into sequences.

It holds where the documents lie, not their tokens: sequences are gathered from the token shards
when they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loader_workers.order import WindowSamples, num_sequences
from loader_workers.token_shard import TokenShard

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


class Window:
    """The sequences of one window, by their position in the joined documents.

    Documents are joined with the end-of-text token between; empty ones leave no trace. Sequence i
    holds the joined tokens from i * sequence_length on, one more than `sequence_length`; the last
    one is padded with the end-of-text token.
    """

    def __init__(
        self,
        samples: WindowSamples,
        shards: Mapping[int, TokenShard],
        *,
        sequence_length: int,
        eot_id: int,
        dtype: np.dtype[np.uint16] | np.dtype[np.uint32],
    ) -> None:
        self._shards = shards
        self._sequence_length = sequence_length
        self._eot_id = eot_id
        self._dtype = dtype
        starts = np.zeros(len(samples.samples), dtype=np.int64)
        ends = np.zeros(len(samples.samples), dtype=np.int64)
        for position, shard in shards.items():
            here = samples.shards == position
            starts[here] = shard.offsets[samples.samples[here]]
            ends[here] = shard.offsets[samples.samples[here] + 1]
        lengths = ends - starts
        full = lengths > 0
        self._source_shards = samples.shards[full]
        self._source_starts = starts[full]
        self._lengths = lengths[full]
        # Where each document starts in the joined tokens: one end-of-text token after each.
        self._starts = np.cumsum(self._lengths + 1) - (self._lengths + 1)
        self.num_tokens = int(self._lengths.sum()) + max(len(self._lengths) - 1, 0)
        self.num_sequences = num_sequences(self.num_tokens, sequence_length=sequence_length)

    def gather(self, sequences: NDArray[np.int64]) -> tuple[Tokens, NDArray[np.uint32]]:
        """Return [sequences, sequence_length + 1] tokens, and how many of each are not padding."""
        width = self._sequence_length + 1
        # Filled with end-of-text: what is left of it are the joints and the padding.
        tokens = np.full((len(sequences), width), self._eot_id, dtype=self._dtype)
        first = sequences * self._sequence_length
        for row, start in zip(tokens, first.tolist(), strict=True):
            self._fill(row, start)
        num_tokens = np.minimum(self.num_tokens - first, width).astype(np.uint32)
        return tokens, num_tokens

    def _fill(self, row: Tokens, start: int) -> None:
        """Copy into `row` what documents have of the joined tokens from `start` on."""
        end = start + len(row)
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        while document < len(self._starts) and self._starts[document] < end:
            at = int(self._starts[document])
            skipped = max(start - at, 0)
            length = min(int(self._lengths[document]), end - at) - skipped
            if length > 0:
                source = int(self._source_starts[document]) + skipped
                shard = self._shards[int(self._source_shards[document])]
                to = at + skipped - start
                row[to : to + length] = shard.tokens[source : source + length]
            document += 1
