"""A window: the documents of a few thousand samples, packed into sequences.

It knows where the documents lie, and gathers sequences from the token shards when they are taken;
or, where there is memory for it, it lays all tokens side by side once (`join`), so that a
sequence is one piece of memory and the token shards are let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from loader_workers.order import WindowSamples
from loader_workers.packing import lay_out
from loader_workers.token_shard import Tokens, TokenShard
from protos.errors import NotReady

ShardsOf = Callable[[], Mapping[int, TokenShard]]
"""Gives the window's token shards by their position in the domain."""


def _changed() -> NotReady:
    # It was evicted, or harmed, and built again from a source that has been damaged since; a window
    # that is opened anew leaves out what is gone, as it would on another worker.
    return NotReady("a token shard changed under an open window; open the stream again")


class Window:
    """The sequences of one window, by their position in its layout.

    Documents are laid out as `loader_workers.packing` says; empty ones leave no trace. Thread-safe:
    `join` and `part` change how sequences are gathered, never what they hold.
    """

    def __init__(
        self,
        samples: WindowSamples,
        shards: Mapping[int, TokenShard],
        *,
        sequence_length: int,
        packing: str,
        eot_id: int,
        dtype: np.dtype[np.uint16] | np.dtype[np.uint32],
    ) -> None:
        self._sequence_length = sequence_length
        self._eot_id = eot_id
        self._dtype = dtype
        starts = np.zeros(len(samples.samples), dtype=np.int64)
        ends = np.zeros(len(samples.samples), dtype=np.int64)
        self._shard_tokens = {position: shard.num_tokens for position, shard in shards.items()}
        for position, shard in shards.items():
            here = samples.shards == position
            starts[here] = shard.offsets[samples.samples[here]]
            ends[here] = shard.offsets[samples.samples[here] + 1]
        lengths = ends - starts
        full = lengths > 0
        layout = lay_out(lengths[full], sequence_length=sequence_length, packing=packing)
        self._source_shards = samples.shards[full][layout.documents]
        self._source_starts = starts[full][layout.documents] + layout.skipped
        self._lengths = layout.lengths
        self._starts = layout.places
        self._stride = layout.stride
        self._num_tokens = layout.num_tokens
        self.num_sequences = len(layout.num_tokens)
        overlap = sequence_length + 1 - layout.stride
        self._num_places = self.num_sequences * layout.stride + overlap if full.any() else 0
        self._rows: Tokens | None = None

    @property
    def joined_bytes(self) -> int:
        """How much memory `join` takes."""
        return self._num_places * self._dtype.itemsize

    @property
    def is_joined(self) -> bool:
        """Whether the tokens lie side by side in memory."""
        return self._rows is not None

    def join(self, shards: Mapping[int, TokenShard]) -> None:
        """Lay the tokens side by side in memory."""
        # Filled with end-of-text: what is left of it are the ends of documents and the padding.
        tokens = np.full(self._num_places, self._eot_id, dtype=self._dtype)
        self._copy(
            tokens, self._starts, self._source_shards, self._source_starts, self._lengths, shards
        )
        self._rows = np.lib.stride_tricks.as_strided(
            tokens,
            (self.num_sequences, self._sequence_length + 1),
            (self._stride * tokens.itemsize, tokens.itemsize),
            writeable=False,
        )

    def part(self) -> None:
        """Let the memory of the joined tokens go."""
        self._rows = None

    def gather(
        self, sequences: NDArray[np.int64], shards: ShardsOf
    ) -> tuple[Tokens, NDArray[np.uint32]]:
        """Return [sequences, sequence_length + 1] tokens, and how many of each are not padding.

        Args:
            sequences: positions in the layout.
            shards: asked for the token shards if the window is not joined.
        """
        width = self._sequence_length + 1
        first = sequences * self._stride
        num_tokens = self._num_tokens[sequences]
        rows = self._rows
        if rows is not None:
            return rows[sequences], num_tokens
        tokens = np.full((len(sequences), width), self._eot_id, dtype=self._dtype)
        self._fill(tokens, first, shards())
        return tokens, num_tokens

    def document_starts(self, sequences: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return where documents begin in each sequence, its own start aside.

        Args:
            sequences: positions in the layout.
        """
        first = sequences * self._stride
        begin = np.searchsorted(self._starts, first, side="right").tolist()
        end = np.searchsorted(self._starts, first + self._sequence_length, side="right").tolist()
        return [
            self._starts[one:other] - at
            for one, other, at in zip(begin, end, first.tolist(), strict=True)
        ]

    def _fill(
        self, rows: Tokens, first: NDArray[np.int64], shards: Mapping[int, TokenShard]
    ) -> None:
        """Copy into each of `rows` what documents have of the places from `first` on."""
        width = rows.shape[1]
        begin = np.maximum(np.searchsorted(self._starts, first, side="right") - 1, 0)
        counts = np.searchsorted(self._starts, first + width) - begin
        row = np.repeat(np.arange(len(rows)), counts)
        run = np.arange(counts.sum()) + np.repeat(begin - np.cumsum(counts) + counts, counts)
        # Counted from the row's own first place; what lies before that is skipped.
        start = self._starts[run] - first[row]
        skipped = np.maximum(-start, 0)
        lengths = np.minimum(self._lengths[run], width - start) - skipped
        kept = lengths > 0
        self._copy(
            rows.reshape(-1),
            (row * width + start + skipped)[kept],
            self._source_shards[run][kept],
            (self._source_starts[run] + skipped)[kept],
            lengths[kept],
            shards,
        )

    def _copy(
        self,
        target: Tokens,
        places: NDArray[np.int64],
        source_shards: NDArray[np.int64],
        source_starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        shards: Mapping[int, TokenShard],
    ) -> None:
        """Copy runs of tokens from their shards to their places in `target`."""
        # A shard that lost documents holds fewer tokens; the rest of it is what it was.
        if {position: shard.num_tokens for position, shard in shards.items()} != self._shard_tokens:
            raise _changed()
        for position, shard in shards.items():
            here = source_shards == position
            shard.scatter(target, places[here], source_starts[here], lengths[here])
