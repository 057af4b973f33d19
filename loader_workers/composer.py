"""Composes the batches of some lanes: a function of spec, index, counts and cursors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loader_workers.lane import LaneReader
from loader_workers.source import WindowSource
from protos.documents import DocumentStarts
from protos.slots import deal
from protos.types import Cursors, Lane, LaneBatch, Step


class Composer:
    """The lanes of one stream, moved on step by step. Not thread-safe."""

    def __init__(
        self,
        source: WindowSource,
        cursors: Cursors,
        *,
        first_slot: int,
        end_slot: int,
        documents: bool = False,
    ) -> None:
        self._spec = source.spec
        self._slots = range(first_slot, end_slot)
        self._documents = documents
        self._lanes = {
            lane: LaneReader(source, lane, places, documents=documents)
            for lane, places in sorted(cursors.items())
        }

    def prepare(self, shares: Sequence[float]) -> None:
        """Have the windows of the domains that have a share opened ahead, largest share first."""
        for domain in sorted(range(len(shares)), key=lambda domain: -shares[domain]):
            if shares[domain] > 0:
                for reader in self._lanes.values():
                    reader.prepare(domain, share=shares[domain])

    def wind(self, counts: Mapping[Lane, NDArray[np.int64]]) -> None:
        """Move lanes over so many sequences of each domain."""
        for lane, by_domain in counts.items():
            for domain, count in enumerate(by_domain.tolist()):
                self._lanes[lane].skip(domain, count)

    def compose(self, step: Step, counts: NDArray[np.int64]) -> tuple[LaneBatch, ...]:
        """Return the lanes' batches of a step with these [domains] counts.

        Raises:
            DomainEmpty: a lane has no tokens in a domain that the step wants.
            NotReady: the worker is stopping.
        """
        labels = deal(counts, lanes=self._spec.lanes, seed=self._spec.seed, step=step)
        return tuple(
            self._lane_batch(lane, reader, labels[lane]) for lane, reader in self._lanes.items()
        )

    def _lane_batch(self, lane: Lane, reader: LaneReader, labels: NDArray[np.uint16]) -> LaneBatch:
        spec = self._spec
        width = spec.slots_per_lane
        tokens = np.empty((width, spec.sequence_length + 1), dtype=spec.token_dtype)
        num_tokens = np.empty(width, dtype=np.uint32)
        places = np.empty((width, 3), dtype=np.uint32)
        starts: list[NDArray[np.int64]] = []
        by_domain = np.argsort(labels, kind="stable")
        ends = np.cumsum(np.bincount(labels, minlength=spec.num_domains)).tolist()
        start = 0
        for domain, end in enumerate(ends):
            if end > start:
                slots, taken = by_domain[start:end], reader.take(domain, end - start)
                tokens[slots], num_tokens[slots] = taken.tokens, taken.num_tokens
                places[slots] = taken.places
                starts += taken.document_starts
                start = end
        lane_first = lane * width
        first = max(self._slots.start, lane_first)
        mine = slice(first - lane_first, min(self._slots.stop - lane_first, width))
        return LaneBatch(
            lane=lane,
            first_slot=first,
            tokens=tokens[mine],
            domain_ids=labels[mine],
            num_tokens=num_tokens[mine],
            places=places[mine],
            cursor_after=reader.places(),
            documents=_in_slot_order(starts, by_domain, mine) if self._documents else None,
        )

    def close(self) -> None:
        """Give up what is being opened ahead; idempotent."""
        for reader in self._lanes.values():
            reader.close()


def _in_slot_order(
    starts: list[NDArray[np.int64]], slots: NDArray[np.int64], mine: slice
) -> DocumentStarts:
    """Bring the sequences' document starts, taken domain by domain, into the order of slots."""
    by_slot = np.argsort(slots)[mine].tolist()
    return DocumentStarts.of([starts[place] for place in by_slot])
