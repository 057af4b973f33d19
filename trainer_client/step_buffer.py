"""Where the lane streams leave batches and the trainer takes them, step by step."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from protos.errors import HeadraceError, InvalidMessage
from protos.spec import RunSpec
from protos.types import Cursors, Lane, LaneBatch, Places, Step, StepBatch


class StepBuffer:
    """Each lane's steps, delivered exactly once and in order; every wait has an end.

    caller        call   waits for                    woken by
    lane stream   put    never; credits bound it      -
    lane stream   turn   its lanes' step before        put, fail, close, timeout
    trainer       wait   every lane's part of a step  put, fail, close, timeout

    What lies here was delivered, so this is where a stream that broke goes on from.
    """

    def __init__(
        self,
        *,
        spec: RunSpec,
        slots: range,
        lanes: Sequence[Lane],
        first_step: Step,
        cursors: Cursors,
        cursor_steps: dict[Lane, Step],
        documents: bool = False,
    ) -> None:
        self._spec = spec
        self._documents = documents
        self._slots = slots
        self._changed = threading.Condition()
        self._next_steps = dict.fromkeys(lanes, first_step)
        self._cursors = {lane: cursors[lane] for lane in lanes}
        self._cursor_steps = {lane: cursor_steps.get(lane, first_step) for lane in lanes}
        self._parts: dict[Step, dict[Lane, tuple[StepBatch, LaneBatch]]] = {}
        self._error: BaseException | None = None
        self._closed = False

    def next_step(self, lane: Lane) -> Step:
        """Return the step that the lane delivers next."""
        with self._changed:
            return self._next_steps[lane]

    def place(self, lane: Lane) -> tuple[Places, Step]:
        """Return the lane's cursor after what it delivered, and the step before which it stands."""
        with self._changed:
            return self._cursors[lane], self._cursor_steps[lane]

    def wait_turn(self, lanes: Sequence[Lane], step: int, *, timeout_s: float) -> bool:
        """Wait until the lanes have delivered all before `step`, or nothing more is taken.

        A lane that moves to another worker is served by both for a moment: the old one up to some
        step, the new one from there on, which may be ready first.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._closed
                    or self._error is not None
                    or all(self._next_steps[lane] >= step for lane in lanes)
                ),
                timeout_s,
            )

    def put(self, batch: StepBatch, lanes: Sequence[Lane]) -> None:
        """Add one stream's part of some steps: all of its lanes or none.

        Raises:
            InvalidMessage: it is not what these lanes deliver next.
        """
        with self._changed:
            if sorted(part.lane for part in batch.lanes) != sorted(lanes):
                raise InvalidMessage(
                    f"step {batch.step}: asked for lanes {list(lanes)}, got "
                    f"{[part.lane for part in batch.lanes]}"
                )
            for part in batch.lanes:
                self._check(batch.step, part)
            end = Step(batch.step + batch.num_steps)
            for step in range(batch.step, end):
                parts = self._parts.setdefault(Step(step), {})
                for part in batch.lanes:
                    parts[part.lane] = (batch, part)
            for part in batch.lanes:
                self._next_steps[part.lane] = end
                self._cursors[part.lane] = part.cursor_after
                self._cursor_steps[part.lane] = end
            self._changed.notify_all()

    def _check(self, step: Step, part: LaneBatch) -> None:
        where = f"lane {part.lane}, step {step}"
        if step != self._next_steps[part.lane]:
            raise InvalidMessage(f"{where}: expected step {self._next_steps[part.lane]}")
        wanted = self.lane_slots(part.lane)
        got = range(part.first_slot, part.first_slot + part.sequences_a_step)
        if got != wanted:
            raise InvalidMessage(f"{where}: asked for slots {wanted}, got {got}")
        num_domains = self._spec.num_domains
        if part.cursor_after.shape != (num_domains, 3):
            raise InvalidMessage(
                f"{where}: a cursor has shape ({num_domains}, 3), got {part.cursor_after.shape}"
            )
        if np.any(part.domain_ids >= num_domains):
            raise InvalidMessage(
                f"{where}: the run has domains 0..{num_domains - 1}, got {part.domain_ids.max()}"
            )
        if np.any(part.num_tokens > self._spec.sequence_length + 1):
            raise InvalidMessage(
                f"{where}: a sequence has at most {self._spec.sequence_length + 1} tokens, got "
                f"{part.num_tokens.max()}"
            )
        if (part.documents is not None) != self._documents:
            raise InvalidMessage(
                f"{where}: where documents begin was {'' if self._documents else 'not '}asked for, "
                f"and did {'not ' if self._documents else ''}come"
            )

    def lane_slots(self, lane: Lane) -> range:
        """Return the slots of a lane that belong to this rank."""
        per_lane = self._spec.slots_per_lane
        first = max(lane * per_lane, self._slots.start)
        return range(first, min((lane + 1) * per_lane, self._slots.stop))

    def missing(self, step: Step) -> list[Lane]:
        """Return the lanes that have not delivered their part of `step`."""
        with self._changed:
            return [lane for lane, next_step in self._next_steps.items() if next_step <= step]

    def wait(self, step: Step, *, timeout_s: float) -> bool:
        """Wait until all of `step` is here; tell whether it is.

        Raises:
            HeadraceError: no more will come, and why.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or self._closed or self._has(step), timeout_s
            )
            if self._has(step):
                return True
            if self._error is not None:
                raise self._error
            if self._closed:
                raise HeadraceError(f"the session was closed while waiting for step {step}")
            return False

    def _has(self, step: Step) -> bool:
        return len(self._parts.get(step, ())) == len(self._next_steps)

    def take(self, step: Step) -> dict[Lane, tuple[StepBatch, LaneBatch]]:
        """Remove and return a step that is here, in the messages that brought it."""
        with self._changed:
            return self._parts.pop(step)

    def fail(self, error: BaseException) -> None:
        """Make every wait for a step that is not here raise `error`; the first one stays."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
