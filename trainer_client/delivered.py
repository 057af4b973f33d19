"""A step as it was delivered: the lanes' parts side by side, in slot order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.documents import DocumentStarts
from protos.types import Cursors, Lane, LaneBatch, Step, StepBatch

Parts = Mapping[Lane, tuple[StepBatch, LaneBatch]]
"""Each lane's part of a step, in the message that brought it, perhaps with other steps."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DeliveredStep:
    """A rank's sequences of a step, in slot order."""

    step: Step
    plan_version: int
    degraded: bool
    slots: range
    tokens: NDArray[Any]
    """[sequences, sequence_length + 1], in the wire's dtype"""

    domain_ids: NDArray[np.uint16]
    num_tokens: NDArray[np.uint32]
    places: NDArray[np.uint32]
    """[sequences, 3]: epoch, window, sequence"""

    documents: DocumentStarts | None
    """None: not asked for."""

    cursors: Cursors
    """Each lane's place after the step."""


class Assembler:
    """Lays lanes' sequences side by side; all steps of a message that brings all lanes at once."""

    def __init__(self, slots: range) -> None:
        self._slots = slots
        self._whole: _WholeMessage | None = None

    def assemble(self, parts: Parts, step: Step) -> DeliveredStep:
        """Return a step."""
        batches = [batch for batch, _ in parts.values()]
        first = batches[0]
        if (
            first.num_steps == 1
            or first.lanes[0].documents is not None
            or any(batch is not first for batch in batches)
        ):
            return assemble(parts, self._slots, step)
        if self._whole is None or self._whole.batch is not first:
            self._whole = _WholeMessage(first)
        return self._whole.at(step, self._slots)


class _WholeMessage:
    """The steps of one message that holds all of a rank's lanes."""

    def __init__(self, batch: StepBatch) -> None:
        self.batch = batch
        self._lanes = sorted(batch.lanes, key=lambda part: part.first_slot)
        self._tokens = self._side_by_side(lambda part: part.tokens)
        self._domain_ids = self._side_by_side(lambda part: part.domain_ids)
        self._num_tokens = self._side_by_side(lambda part: part.num_tokens)
        self._places = self._side_by_side(lambda part: part.places)

    def _side_by_side(self, field: Callable[[LaneBatch], NDArray[Any]]) -> NDArray[Any]:
        """Return [steps, slots, ...] of the lanes' [steps x sequences, ...]."""
        num_steps = self.batch.num_steps
        arrays = [field(part) for part in self._lanes]
        return np.concatenate(
            [array.reshape(num_steps, -1, *array.shape[1:]) for array in arrays], axis=1
        )

    def at(self, step: Step, slots: range) -> DeliveredStep:
        """Return one of the steps, as views."""
        index = step - self.batch.step
        return DeliveredStep(
            step=step,
            plan_version=self.batch.plan_version,
            degraded=self.batch.degraded,
            slots=slots,
            tokens=self._tokens[index],
            domain_ids=self._domain_ids[index],
            num_tokens=self._num_tokens[index],
            places=self._places[index],
            documents=None,
            cursors={part.lane: part.cursor_at(index) for part in self._lanes},
        )


def assemble(parts: Parts, slots: range, step: Step) -> DeliveredStep:
    """Lay the lanes' sequences of one step side by side."""
    batches = [batch for batch, _ in parts.values()]
    own = [part.at(step - batch.step) for batch, part in parts.values()]
    lanes = sorted(own, key=lambda part: part.first_slot)
    documents = [part.documents for part in lanes if part.documents is not None]
    delivered = DeliveredStep(
        step=step,
        plan_version=max(batch.plan_version for batch in batches),
        degraded=any(batch.degraded for batch in batches),
        slots=slots,
        tokens=np.concatenate([part.tokens for part in lanes]),
        domain_ids=np.concatenate([part.domain_ids for part in lanes]),
        num_tokens=np.concatenate([part.num_tokens for part in lanes]),
        places=np.concatenate([part.places for part in lanes]),
        documents=DocumentStarts.join(documents) if documents else None,
        cursors={part.lane: part.cursor_after for part in lanes},
    )
    assert len(delivered.tokens) == len(slots)
    return delivered
