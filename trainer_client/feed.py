"""A rank's data: all of its lane streams, and the steps that they add up to."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence

from protos.client import ControlClient
from protos.errors import (
    HeadraceError,
    NotAuthenticated,
    NotReady,
    Retryable,
    WorkerUnreachable,
)
from protos.spec import RunSpec
from protos.types import Lane, LaneEndpoint, LaneTable, Step
from trainer_client.delivered import Assembler, DeliveredStep
from trainer_client.joining import Membership
from trainer_client.lane_stream import LaneStream, group_lanes
from trainer_client.step_buffer import StepBuffer

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 3.0
"""A trainer that waits asks this often whether its lanes have moved to another worker."""

_LEAD_S = 0.5
"""A worker that lanes move to hears of it so long before it must deliver, to open its windows."""

_MOST_LEAD_STEPS = 256
_ASK_TIMEOUT_S = 1.0
_PACE_WEIGHT = 0.2
"""Of the newest step in the running mean of the time that steps take."""


_STEPS_AHEAD = 3
_BYTES_AHEAD = 4 << 20
_MOST_STEPS_AHEAD = 128
"""Short steps are asked for further ahead: the way of a message is longer than they take."""


class Feed:
    """Streams the batches of a membership; `take` gives them to the trainer, step by step.

    Each lane belongs to one stream that serves it to the end. When lanes move to another worker,
    that stream's end is brought forward to a step that has not been granted yet, and another one
    is opened for the steps from there on, while the old one still serves what comes before.
    """

    def __init__(
        self, member: Membership, control: ControlClient, *, documents: bool = False
    ) -> None:
        self._member = member
        self._control = control
        self._prefetch_steps = steps_ahead(member.spec, member.slots)
        self._documents = documents
        self._assembler = Assembler(member.slots)
        self._consumed_through = member.first_step - 1
        self._lock = threading.Lock()
        self._streams: list[LaneStream] = []
        self._closed = False
        self._lanes_version = member.lanes_version
        self._refusal: HeadraceError | None = None
        """Why the controller did not say who serves lanes, when it was asked last."""

        self._taken_s = math.nan
        self._pace_s = math.nan
        self._buffer = StepBuffer(
            spec=member.spec,
            slots=member.slots,
            lanes=member.lanes,
            first_step=member.first_step,
            cursors=member.cursors,
            cursor_steps=member.cursor_steps,
            documents=documents,
        )
        with self._lock:
            self._start(
                member.lanes,
                list(member.endpoints.values()),
                range(member.first_step, member.spec.num_steps),
            )

    def _start(
        self, lanes: Sequence[Lane], endpoints: Sequence[LaneEndpoint], steps: range
    ) -> None:
        """Stream some lanes from the workers that serve them; `_lock` is held."""
        if self._closed:
            return
        for endpoint, group in group_lanes(lanes, endpoints):
            stream = LaneStream(
                lanes=group,
                endpoint=endpoint,
                steps=steps,
                member=self._member,
                buffer=self._buffer,
                prefetch_steps=self._prefetch_steps,
                documents=self._documents,
                relocate=self._relocate,
            )
            stream.tell(consumed_through=self._consumed_through)
            self._streams.append(stream)
            stream.start()

    def _relocate(self, stream: LaneStream) -> None:
        """Find out where a stream that broke goes on; called on its own thread."""
        try:
            table = self._locate(unreachable=stream.endpoint)
        except (Retryable, NotAuthenticated) as error:
            # The controller is away, or has renewed its token first; the worker may come back at
            # its old address.
            logger.info("cannot ask who serves lanes %s: %s", stream.lanes, error)
            return
        groups = group_lanes(stream.lanes, table.endpoints)
        with self._lock:
            if len(groups) == 1:
                stream.endpoint = groups[0][0]
            elif groups:
                steps = range(stream.next_step, stream.steps.stop)
                stream.stop()
                self._start(stream.lanes, table.endpoints, steps)

    def _locate(self, *, unreachable: str = "", timeout_s: float = 5.0) -> LaneTable:
        """Ask the controller who serves each lane.

        Raises:
            HeadraceError: it does not say; the sentence is kept for a trainer that waits in vain.
        """
        try:
            table = self._control.locate(
                self._member.generation, unreachable=unreachable, timeout_s=timeout_s
            )
        except HeadraceError as error:
            self._refusal = error
            raise
        self._refusal = None
        return table

    def hear_lanes(self, version: int) -> None:
        """Follow lanes that have moved, if this version of their table is not known yet.

        Asks the controller; to be called on a thread that training does not wait for.
        """
        if version == self._lanes_version:
            return
        try:
            table = self._locate(timeout_s=_ASK_TIMEOUT_S)
        except HeadraceError as error:
            # The next report brings the version again; a stream that breaks asks for itself.
            logger.debug("cannot ask where lanes have moved to: %s", error)
            return
        self._hand_over(table)

    def _hand_over(self, table: LaneTable) -> None:
        """Have lanes that are served elsewhere come from there, from a step ahead on."""
        with self._lock:
            self._lanes_version = table.version
            self._streams = [stream for stream in self._streams if not stream.is_over()]
            num_steps = self._member.spec.num_steps
            wanted = group_lanes(self._member.lanes, table.endpoints)
            staying = [(endpoint, tuple(lanes)) for endpoint, lanes in wanted]
            moving = [
                stream
                for stream in self._streams
                if stream.steps.stop == num_steps and (stream.endpoint, stream.lanes) not in staying
            ]
            if not moving or not wanted:
                return
            granted = self._consumed_through + self._prefetch_steps
            first = max(granted, self._consumed_through + self._lead_steps()) + 1
            first = Step(max(first, *(stream.steps.start for stream in moving)))
            if first >= num_steps:
                return
            lanes = [lane for stream in moving for lane in stream.lanes]
            logger.info(
                "lanes %s come from other workers from step %d on rank=%d",
                lanes,
                first,
                self._member.rank,
            )
            for stream in moving:
                stream.end_at(first)
            self._start(lanes, table.endpoints, range(first, num_steps))

    def _lead_steps(self) -> int:
        """Return how many steps take about `_LEAD_S`; 1 before any pace is known."""
        if math.isnan(self._pace_s):
            return 1
        return min(max(math.ceil(_LEAD_S / max(self._pace_s, 1e-6)), 1), _MOST_LEAD_STEPS)

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
        now = time.monotonic()
        with self._lock:
            self._consumed_through = step
            if not math.isnan(self._taken_s):
                newest = now - self._taken_s
                before = newest if math.isnan(self._pace_s) else self._pace_s
                self._pace_s = before + _PACE_WEIGHT * (newest - before)
            self._taken_s = now
            for stream in self._streams:
                stream.tell(consumed_through=step)
        return self._assembler.assemble(parts, step)

    def _wait_for(self, step: Step) -> None:
        if self._buffer.wait(step, timeout_s=0.0):
            return
        timeout_s = self._member.spec.data_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            missing = self._buffer.missing(step)
            with self._lock:
                for stream in self._streams:
                    if _misses(stream, step, missing):
                        stream.tell(consumed_through=self._consumed_through, needed_step=int(step))
            left_s = deadline - time.monotonic()
            if self._buffer.wait(step, timeout_s=min(max(left_s, 0.0), _LOOK_AGAIN_S)):
                return
            if left_s <= 0:
                self._raise_late(step, timeout_s)
            self._leave_hanging_workers(step)

    def _leave_hanging_workers(self, step: Step) -> None:
        # A worker that hangs breaks no stream; the controller notices and gives its lanes away.
        try:
            table = self._locate(timeout_s=_ASK_TIMEOUT_S)
        except Retryable:
            return
        served_by = {endpoint.lane: endpoint.endpoint for endpoint in table.endpoints}
        missing = self._buffer.missing(step)
        with self._lock:
            for stream in self._streams:
                if _misses(stream, step, missing) and any(
                    served_by.get(lane, stream.endpoint) != stream.endpoint for lane in stream.lanes
                ):
                    stream.reopen()

    def _raise_late(self, step: Step, timeout_s: float) -> None:
        missing = self._buffer.missing(step)
        late = f"step {step} did not come to rank {self._member.rank} within {timeout_s:g} s"
        with self._lock:
            behind = [each for each in self._streams if _misses(each, step, missing)]
        broken = {each: each.cause for each in behind if each.cause is not None}
        if broken:
            causes = "; ".join(f"lanes {list(each.lanes)}: {why}" for each, why in broken.items())
            refusal = self._refusal
            asked = f"; the controller says: {refusal}" if refusal is not None else ""
            raise WorkerUnreachable(
                f"{late}, lanes {missing} are missing; {causes}{asked}"
            ) from next(iter(broken.values()))
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


def _misses(stream: LaneStream, step: Step, missing: Sequence[Lane]) -> bool:
    """Tell whether a stream still owes its part of a step."""
    return step in stream.steps and not set(missing).isdisjoint(stream.lanes)


def steps_ahead(spec: RunSpec, slots: range) -> int:
    """Return how many steps are asked for before they are consumed: so many, or so many bytes."""
    step_bytes = len(slots) * (spec.sequence_length + 1) * spec.token_dtype.itemsize
    return max(_STEPS_AHEAD, min(_BYTES_AHEAD // step_bytes, _MOST_STEPS_AHEAD))
