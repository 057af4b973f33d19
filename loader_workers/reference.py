"""What a window must hold, computed the slow and plain way from the raw shards.

Accounting and tests hold what trainers received against it. It shares the definition of the order
and the decoding of samples with the streaming path, but neither its cache, nor its windows, lanes
and cursors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from loader_workers.convert import Converter
from loader_workers.order import EpochOrder, NumberedShards, OrderKey
from loader_workers.token_shard import Tokens
from loader_workers.tokenize import Tokenize
from protos.dataset_index import DatasetIndex
from protos.spec import BEST_FIT, RunSpec
from protos.types import Lane

OwnedToken = tuple[int, int]
"""A token, and the number of its document in the window."""


class Reference:
    """Windows computed from raw shards; each shard is read and tokenized once, and kept."""

    def __init__(self, spec: RunSpec, index: DatasetIndex, tokenize: Tokenize | None) -> None:
        self._spec = spec
        self._index = index
        self._converter = Converter.of_run(spec, tokenize)
        self._documents: dict[tuple[str, int], list[Tokens]] = {}

    def num_windows(self, domain: str, lane: Lane, epoch: int) -> int:
        """Return how many windows a lane has in an epoch of a domain."""
        return self._order(domain, lane, epoch).num_windows

    def documents(self, domain: str, lane: Lane, epoch: int, window: int) -> list[Tokens]:
        """Return the documents of a window that have tokens, in the order of joining."""
        samples = self._order(domain, lane, epoch).window(window)
        found = [
            self._shard(domain, shard)[sample]
            for shard, sample in zip(samples.shards.tolist(), samples.samples.tolist(), strict=True)
        ]
        return [document for document in found if len(document)]

    def sequences(
        self, domain: str, lane: Lane, epoch: int, window: int
    ) -> tuple[Tokens, NDArray[np.uint32]]:
        """Return a window's sequences in delivery order, and how many tokens of each count."""
        spec = self._spec
        found = self.owned_sequences(domain, lane, epoch, window)
        tokens = np.full((len(found), spec.sequence_length + 1), spec.eot_id, spec.token_dtype)
        num_tokens = np.zeros(len(found), dtype=np.uint32)
        for row, sequence in enumerate(found):
            tokens[row, : len(sequence)] = [token for token, _ in sequence]
            num_tokens[row] = len(sequence)
        return tokens, num_tokens

    def owned_sequences(
        self, domain: str, lane: Lane, epoch: int, window: int
    ) -> list[list[OwnedToken]]:
        """Return a window's sequences in delivery order, each token with its document."""
        spec = self._spec
        documents = [
            [(token, number) for token in [*document.tolist(), spec.eot_id]]
            for number, document in enumerate(self.documents(domain, lane, epoch, window))
        ]
        if spec.packing == BEST_FIT:
            made = _pack_best_fit(documents, spec.sequence_length)
        else:
            # After a window's last document stands no end-of-text.
            joined = [token for document in documents for token in document][:-1]
            made = list(_cut(joined, spec.sequence_length))
        order = self._order(domain, lane, epoch).sequence_order(window, len(made))
        return [made[number] for number in order.tolist()]

    def _order(self, domain: str, lane: Lane, epoch: int) -> EpochOrder:
        spec = self._spec
        samples = np.array([shard.num_samples for shard in self._index.shards(domain)])
        key = OrderKey(
            seed=spec.seed,
            domain=domain,
            lane=lane,
            lanes=spec.lanes,
            window_samples=spec.window_samples,
            interleave=spec.interleave,
        )
        numbered = NumberedShards(spec.seed, domain, epoch, shard_samples=samples)
        return EpochOrder(key, epoch=epoch, numbered=numbered)

    def _shard(self, domain: str, position: int) -> list[Tokens]:
        if (domain, position) not in self._documents:
            converted = self._converter.convert(self._index.shards(domain)[position])
            self._documents[domain, position] = [
                converted.tokens[start:end] for start, end in pairwise(converted.offsets.tolist())
            ]
        return self._documents[domain, position]


def expected_sequences(
    spec: RunSpec,
    index: DatasetIndex,
    tokenize: Tokenize | None,
    domain: str,
    lane: Lane,
    epoch: int,
    window: int,
) -> tuple[Tokens, NDArray[np.uint32]]:
    """Return a window's sequences in delivery order; for many windows keep a `Reference`."""
    return Reference(spec, index, tokenize).sequences(domain, lane, epoch, window)


def _pack_best_fit(
    documents: list[list[OwnedToken]], sequence_length: int
) -> list[list[OwnedToken]]:
    """Lay each piece, the largest first, into the fullest sequence that has room for it."""
    pieces = [piece for document in documents for piece in _cut(document, sequence_length)]
    bins: list[list[int]] = []
    rooms: list[int] = []
    for number in sorted(range(len(pieces)), key=lambda number: (-len(pieces[number]), number)):
        size = len(pieces[number])
        fitting = [(room, at) for at, room in enumerate(rooms) if room >= size]
        if not fitting:
            fitting = [(sequence_length + 1, len(bins))]
            bins.append([])
            rooms.append(sequence_length + 1)
        room, at = min(fitting)
        bins[at].append(number)
        rooms[at] = room - size
    return [[token for number in sorted(held) for token in pieces[number]] for held in bins]


def _cut(joined: list[OwnedToken], sequence_length: int) -> Iterator[list[OwnedToken]]:
    """Cut so that every token but the first is trained on once; a lone token stands alone."""
    if len(joined) == 1:
        yield joined
    for start in range(0, len(joined) - 1, sequence_length):
        yield joined[start : start + sequence_length + 1]
