"""What loader workers stream to ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.documents import DocumentStarts
from protos.plans import Cursors, Generation, Lane, Places, Rank, Step


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class OpenStream:
    """A rank asks a loader worker for the batches of some lanes."""

    run_id: str
    generation: Generation
    rank: Rank
    from_step: Step
    first_slot: int
    """Only slots in [first_slot, end_slot) of the global batch are sent."""

    end_slot: int
    cursors: Cursors
    """One for each lane asked for."""

    cursor_steps: Mapping[Lane, Step]
    """The step before which each cursor stands; one that is behind `from_step` is wound forward."""

    credits: int
    """Steps that may be sent before the first `Credit`."""

    documents: bool = False
    """Send where documents begin."""

    most_steps: int = 1
    """That may come in one `StepBatch`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """A rank consumed batches, or waits for one."""

    steps: int = 0
    """So many more steps may be sent."""

    needed_step: int = -1
    """The trainer waits for this step now; -1: it does not wait."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LaneBatch:
    """One lane's sequences of a step, in slot order; or of several, step after step."""

    lane: Lane
    first_slot: int
    """Of each step's first sequence here."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """[sequences, sequence_length + 1]"""

    domain_ids: NDArray[np.uint16]
    """[sequences]"""

    num_tokens: NDArray[np.uint32]
    """[sequences]: how many of the tokens are not padding."""

    places: NDArray[np.uint32]
    """[sequences, 3]: epoch, window and sequence that each came from."""

    cursor_after: Places
    """The whole lane's place in every domain after the last step."""

    earlier_cursors: NDArray[np.uint32] | None = None
    """[steps - 1, domains, 3]: the same after each step before it; None: there is only one step."""

    documents: DocumentStarts | None = None
    """Of these sequences; None: not asked for."""

    @property
    def num_steps(self) -> int:
        """How many steps the sequences belong to."""
        return 1 if self.earlier_cursors is None else len(self.earlier_cursors) + 1

    @property
    def sequences_a_step(self) -> int:
        """How many of the sequences belong to each step."""
        return len(self.tokens) // self.num_steps

    def cursor_at(self, index: int) -> Places:
        """Return the lane's place after one of the steps."""
        if self.earlier_cursors is None or index == len(self.earlier_cursors):
            return self.cursor_after
        earlier: Places = self.earlier_cursors[index]
        return earlier

    def at(self, index: int) -> LaneBatch:
        """Return one step's part, as views."""
        if self.earlier_cursors is None:
            return self
        count = self.sequences_a_step
        rows = slice(index * count, (index + 1) * count)
        return LaneBatch(
            lane=self.lane,
            first_slot=self.first_slot,
            tokens=self.tokens[rows],
            domain_ids=self.domain_ids[rows],
            num_tokens=self.num_tokens[rows],
            places=self.places[rows],
            cursor_after=self.cursor_at(index),
            documents=None if self.documents is None else self.documents.of_rows(rows),
        )


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepBatch:
    """What one stream carries of one step, or of some consecutive ones under one plan."""

    step: Step
    """The first of them."""

    plan_version: int
    degraded: bool
    """Composed with the last plan, because no seal came."""

    lanes: tuple[LaneBatch, ...]
    num_steps: int = 1

    def __post_init__(self) -> None:
        for part in self.lanes:
            if part.num_steps != self.num_steps or len(part.tokens) % self.num_steps:
                raise ValueError(
                    f"step {self.step}: lane {part.lane} must hold {self.num_steps} steps of "
                    f"equally many sequences, got {part.num_steps} steps and {len(part.tokens)}"
                )
