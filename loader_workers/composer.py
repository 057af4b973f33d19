"""Composes the batches of some lanes: a function of spec, index, counts and cursors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_workers.lane import LaneReader
from loader_workers.source import WindowSource
from protos.documents import DocumentStarts
from protos.slots import deal_steps
from protos.types import Cursors, Lane, LaneBatch, Places, Step


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

    @property
    def step_bytes(self) -> int:
        """How much the tokens of a step take."""
        spec = self._spec
        rows = min(len(self._lanes) * spec.slots_per_lane, len(self._slots))
        return rows * (spec.sequence_length + 1) * spec.token_dtype.itemsize

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

    def compose(
        self,
        step: Step,
        counts: NDArray[np.int64],
        *,
        own: Mapping[Lane, NDArray[np.int64]] = MappingProxyType({}),
    ) -> tuple[LaneBatch, ...]:
        """Return the lanes' batches of a step with these [domains] counts; see `compose_steps`.

        A lane that has counts of its `own` gets its part of those.
        """
        labels = self._deal(step, counts[None])
        for lane, theirs in own.items():
            labels[:, lane] = self._deal(step, theirs[None])[:, lane]
        return self._lane_batches(labels)

    def compose_steps(self, step: Step, counts: NDArray[np.int64]) -> tuple[LaneBatch, ...]:
        """Return the lanes' batches of consecutive steps.

        Args:
            step: the first of them.
            counts: [steps, domains] of each.

        Raises:
            DomainEmpty: a lane has no tokens in a domain that a step wants.
            NotReady: the worker is stopping.
        """
        return self._lane_batches(self._deal(step, counts))

    def _deal(self, step: Step, counts: NDArray[np.int64]) -> NDArray[np.uint16]:
        return deal_steps(counts, lanes=self._spec.lanes, seed=self._spec.seed, step=step)

    def _lane_batches(self, labels: NDArray[np.uint16]) -> tuple[LaneBatch, ...]:
        return tuple(
            self._lane_batch(lane, reader, labels[:, lane]) for lane, reader in self._lanes.items()
        )

    def _lane_batch(self, lane: Lane, reader: LaneReader, labels: NDArray[np.uint16]) -> LaneBatch:
        """Take the sequences of all steps, domain by domain, in the order of steps and slots."""
        spec = self._spec
        num_steps, width = labels.shape
        total = num_steps * width
        tokens = np.empty((total, spec.sequence_length + 1), dtype=spec.token_dtype)
        num_tokens = np.empty(total, dtype=np.uint32)
        places, after = np.empty((2, total, 3), dtype=np.uint32)
        before = reader.places()
        starts: list[NDArray[np.int64]] = []
        by_domain = np.argsort(labels.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(labels.ravel(), minlength=spec.num_domains)).tolist()
        start = 0
        for domain, end in enumerate(ends):
            if end > start:
                slots, taken = by_domain[start:end], reader.take(domain, end - start)
                tokens[slots], num_tokens[slots] = taken.tokens, taken.num_tokens
                places[slots], after[slots] = taken.places, taken.places_after
                starts += taken.document_starts
                start = end
        lane_first = lane * width
        first = max(self._slots.start, lane_first)
        mine = slice(first - lane_first, min(self._slots.stop - lane_first, width))
        return LaneBatch(
            lane=lane,
            first_slot=first,
            tokens=_of_slots(tokens, num_steps, mine),
            domain_ids=labels[:, mine].reshape(-1),
            num_tokens=_of_slots(num_tokens, num_steps, mine),
            places=_of_slots(places, num_steps, mine),
            cursor_after=reader.places(),
            earlier_cursors=_earlier_cursors(labels, after, before) if num_steps > 1 else None,
            documents=_in_slot_order(starts, by_domain.reshape(num_steps, width), mine)
            if self._documents
            else None,
        )

    def close(self) -> None:
        """Give up what is being opened ahead; idempotent."""
        for reader in self._lanes.values():
            reader.close()


def _in_slot_order(
    starts: list[NDArray[np.int64]], slots: NDArray[np.int64], mine: slice
) -> DocumentStarts:
    """Bring the sequences' document starts, taken domain by domain, into the order of slots.

    `slots` is [steps, slots]: where each sequence belongs.
    """
    by_slot = np.argsort(slots, axis=None).reshape(slots.shape)[:, mine]
    return DocumentStarts.of([starts[place] for place in by_slot.ravel().tolist()])


def _of_slots(array: NDArray[Any], num_steps: int, mine: slice) -> NDArray[Any]:
    """Return the rows of some slots of each step."""
    by_step = array.reshape(num_steps, -1, *array.shape[1:])
    return by_step[:, mine].reshape(-1, *array.shape[1:])


def _earlier_cursors(
    labels: NDArray[np.uint16], after: NDArray[np.uint32], before: Places
) -> NDArray[np.uint32]:
    """Return [steps - 1, domains, 3]: a lane's place in every domain after each step but the last.

    Args:
        labels: [steps, slots] the domains of the lane's sequences.
        after: [steps x slots, 3] the place in its domain after each sequence.
        before: [domains, 3] the places before the first step.
    """
    num_steps, width = labels.shape
    rows = np.full((num_steps, len(before)), -1, dtype=np.int64)
    flat = np.arange(num_steps * width)
    np.maximum.at(rows, (flat // width, labels.ravel()), flat)
    newest = np.maximum.accumulate(rows[:-1], axis=0)
    return np.where((newest < 0)[:, :, None], before, after[newest])
