"""A rank's data: all of its lane streams, and the steps that they add up to."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.client import ControlClient
from protos.documents import DocumentStarts
from protos.errors import NotReady, Retryable, WorkerUnreachable
from protos.types import Cursors, Lane, LaneBatch, Step, StepBatch
from trainer_client.joining import Membership
from trainer_client.lane_stream import LaneStream, group_lanes
from trainer_client.step_buffer import StepBuffer

_LOOK_AGAIN_S = 3.0
"""A trainer that waits asks this often whether its lanes have moved to another worker."""


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


class Feed:
    """Streams the batches of a membership; `take` gives them to the trainer, step by step."""

    def __init__(
        self,
        member: Membership,
        control: ControlClient,
        *,
        prefetch_steps: int = 3,
        documents: bool = False,
    ) -> None:
        self._member = member
        self._control = control
        self._prefetch_steps = prefetch_steps
        self._documents = documents
        self._consumed_through = member.first_step - 1
        self._lock = threading.Lock()
        self._streams: list[LaneStream] = []
        self._closed = False
        self._buffer = StepBuffer(
            spec=member.spec,
            slots=member.slots,
            lanes=member.lanes,
            first_step=member.first_step,
            cursors=member.cursors,
            cursor_steps=member.cursor_steps,
            documents=documents,
        )
        for endpoint, lanes in group_lanes(member.lanes, list(member.endpoints.values())):
            self._start(lanes, endpoint)

    def _start(self, lanes: Sequence[Lane], endpoint: str) -> None:
        stream = LaneStream(
            lanes=lanes,
            endpoint=endpoint,
            member=self._member,
            control=self._control,
            buffer=self._buffer,
            prefetch_steps=self._prefetch_steps,
            documents=self._documents,
            split=self._start,
        )
        with self._lock:
            if self._closed:
                return
            stream.tell(consumed_through=self._consumed_through)
            self._streams.append(stream)
            stream.start()

    def has(self, step: Step) -> bool:
        """Tell whether `take` would not wait."""
        return not self._buffer.missing(step)

    def take(self, step: Step) -> DeliveredStep:
        """Wait for a step and return it; each step is taken once, in order.

        Raises:
            WorkerUnreachable: it did not come within the run's `data_timeout_s`.
            NotReady: the same, though the workers are connected.
            HeadraceError: it will never come, and why.
        """
        self._wait_for(step)
        parts = self._buffer.take(step)
        with self._lock:
            self._consumed_through = step
            for stream in self._streams:
                stream.tell(consumed_through=step)
        return assemble(parts, self._member.slots)

    def _wait_for(self, step: Step) -> None:
        timeout_s = self._member.spec.data_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            missing = self._buffer.missing(step)
            with self._lock:
                for stream in self._streams:
                    if missing and not set(missing).isdisjoint(stream.lanes):
                        stream.tell(consumed_through=self._consumed_through, needed_step=int(step))
            left_s = deadline - time.monotonic()
            if self._buffer.wait(step, timeout_s=min(max(left_s, 0.0), _LOOK_AGAIN_S)):
                return
            if left_s <= 0:
                self._raise_late(step, timeout_s)
            self._follow_moved_lanes()

    def _follow_moved_lanes(self) -> None:
        # A worker that hangs breaks no stream; the controller notices and gives its lanes away.
        try:
            endpoints = self._control.locate(self._member.generation, timeout_s=1.0)
        except Retryable:
            return
        served_by = {endpoint.lane: endpoint.endpoint for endpoint in endpoints}
        with self._lock:
            for stream in self._streams:
                if any(
                    served_by.get(lane, stream.endpoint) != stream.endpoint for lane in stream.lanes
                ):
                    stream.reopen()

    def _raise_late(self, step: Step, timeout_s: float) -> None:
        missing = self._buffer.missing(step)
        late = f"step {step} did not come to rank {self._member.rank} within {timeout_s:g} s"
        with self._lock:
            behind = [each for each in self._streams if not set(missing).isdisjoint(each.lanes)]
        for stream in behind:
            if stream.cause is not None:
                raise WorkerUnreachable(
                    f"{late}, lanes {stream.lanes} are missing: {stream.cause}"
                ) from stream.cause
        workers = ", ".join(sorted({stream.endpoint for stream in behind}))
        raise NotReady(
            f"{late}: the loader worker at {workers} is connected but sends nothing for lanes "
            f"{missing}; see `headrace status` and the worker's log"
        )

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End all streams; closing twice does no harm."""
        with self._lock:
            self._closed = True
            streams = list(self._streams)
        self._buffer.close()
        for stream in streams:
            stream.stop()
        deadline = time.monotonic() + timeout_s
        for stream in streams:
            stream.join(max(deadline - time.monotonic(), 0.0))


def assemble(parts: dict[Lane, tuple[StepBatch, LaneBatch]], slots: range) -> DeliveredStep:
    """Lay the lanes' sequences of one step side by side, in slot order."""
    batches = [batch for batch, _ in parts.values()]
    lanes = sorted((part for _, part in parts.values()), key=lambda part: part.first_slot)
    documents = [part.documents for part in lanes if part.documents is not None]
    delivered = DeliveredStep(
        step=batches[0].step,
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
