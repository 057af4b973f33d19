"""One stream of some lanes' batches, kept going over breaks and moves to other workers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from protos.client import ControlClient, DataClient, Stream
from protos.errors import NotAuthenticated, Retryable, WorkerUnreachable
from protos.retry import Retry
from protos.types import Credit, Lane, LaneEndpoint, OpenStream, StepBatch
from trainer_client.joining import Membership
from trainer_client.step_buffer import StepBuffer

logger = logging.getLogger(__name__)

_RETRY = Retry(first_wait_s=0.05, max_wait_s=1.0)


class _Credits:
    """The credits of one opened stream; gRPC reads them on a thread of its own.

    caller   call            waits for          woken by
    gRPC     next            a credit           put, end
    others   put, end        never              -
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Credit | None] = queue.SimpleQueue()

    def put(self, credit: Credit) -> None:
        self._queue.put(credit)

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[Credit]:
        return iter(self._queue.get, None)


class LaneStream(threading.Thread):
    """Fills the buffer with the steps of lanes that one worker serves.

    When the stream breaks it asks who serves the lanes now and opens it again from the next step
    that the buffer does not hold. Lanes that then lie with different workers part: this stream
    keeps those of one worker, `split` gets the others.
    """

    def __init__(
        self,
        *,
        lanes: Sequence[Lane],
        endpoint: str,
        member: Membership,
        control: ControlClient,
        buffer: StepBuffer,
        prefetch_steps: int,
        documents: bool,
        split: Callable[[Sequence[Lane], str], None],
    ) -> None:
        super().__init__(name=f"headrace-lanes-{lanes[0]}-{lanes[-1]}", daemon=True)
        self.lanes = list(lanes)
        self.endpoint = endpoint
        self.cause: Retryable | None = None
        """Why the stream does not run at the moment; None: it runs."""

        self._member = member
        self._control = control
        self._buffer = buffer
        self._prefetch_steps = prefetch_steps
        self._documents = documents
        self._split = split
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._credits = _Credits()
        self._granted_through = member.first_step - 1
        self._consumed_through = member.first_step - 1
        self._needed_step = -1
        self._stream: Stream[StepBatch] | None = None

    def tell(self, *, consumed_through: int, needed_step: int = -1) -> None:
        """Say what the trainer consumed, and which step it waits for (-1: none)."""
        with self._lock:
            self._consumed_through = consumed_through
            more = consumed_through + self._prefetch_steps - self._granted_through
            if more > 0 or needed_step != self._needed_step:
                self._needed_step = needed_step
                self._granted_through += max(more, 0)
                self._credits.put(Credit(steps=max(more, 0), needed_step=needed_step))

    def reopen(self) -> None:
        """Break the stream, so that it asks again who serves its lanes."""
        with self._lock:
            if self._stream is not None:
                self._stream.cancel()

    def stop(self) -> None:
        """End the thread soon; stopping twice does no harm."""
        self._stopping.set()
        self.reopen()

    def run(self) -> None:
        """Stream until the run's last step, `stop`, or an error that trying again cannot mend."""
        try:
            self._keep_streaming()
        except Exception as error:
            # Whatever it is, the trainer that waits for these lanes must hear of it.
            self._buffer.fail(error)

    def _keep_streaming(self) -> None:
        num_tries = 0
        while not self._done():
            before = self._buffer.next_step(self.lanes[0])
            try:
                self._stream_once()
                cause: Retryable = WorkerUnreachable(f"{self.endpoint} ended the stream")
            except Retryable as error:
                cause = error
            except NotAuthenticated as error:
                # The worker took this token before: it was renewed there first.
                cause = WorkerUnreachable(f"{self.endpoint} lets nobody in: {error}")
            if self._done():
                return
            next_step = self._buffer.next_step(self.lanes[0])
            num_tries = 1 if next_step > before else num_tries + 1
            self.cause = cause
            # A worker that stays away is said once, not at every try.
            logger.log(
                logging.WARNING if num_tries == 1 else logging.DEBUG,
                "stream of lanes %s broke rank=%d step=%d: %s",
                self.lanes,
                self._member.rank,
                next_step,
                cause,
            )
            self._stopping.wait(_RETRY.wait_s(num_tries))
            if not self._done():
                self._find_workers()

    def _done(self) -> bool:
        return (
            self._stopping.is_set()
            or self._buffer.next_step(self.lanes[0]) >= self._member.spec.num_steps
        )

    def _stream_once(self) -> None:
        spec = self._member.spec
        client = DataClient(self.endpoint, security=self._member.security)
        opening, credits = self._open()
        try:
            stream = client.stream_batches(
                opening,
                iter(credits),
                token_dtype=spec.token_dtype,
                sequence_length=spec.sequence_length,
            )
            with self._lock:
                self._stream = stream
            if self._stopping.is_set():
                return
            for batch in stream:
                self._buffer.put(batch, self.lanes)
                self.cause = None
                if self._done():
                    return
        finally:
            with self._lock:
                stream_now, self._stream = self._stream, None
            if stream_now is not None:
                stream_now.cancel()
            credits.end()
            client.close()

    def _open(self) -> tuple[OpenStream, _Credits]:
        member = self._member
        places = {lane: self._buffer.place(lane) for lane in self.lanes}
        from_step = self._buffer.next_step(self.lanes[0])
        with self._lock:
            self._granted_through = self._consumed_through + self._prefetch_steps
            opening = OpenStream(
                run_id=member.spec.run_id,
                generation=member.generation,
                rank=member.rank,
                from_step=from_step,
                first_slot=member.slots.start,
                end_slot=member.slots.stop,
                cursors={lane: cursor for lane, (cursor, _) in places.items()},
                cursor_steps={lane: step for lane, (_, step) in places.items()},
                credits=max(self._granted_through + 1 - from_step, 0),
                documents=self._documents,
            )
            self._credits = _Credits()
            if self._needed_step >= from_step:
                self._credits.put(Credit(needed_step=self._needed_step))
            return opening, self._credits

    def _find_workers(self) -> None:
        try:
            endpoints = self._control.locate(self._member.generation)
        except (Retryable, NotAuthenticated) as error:
            # The controller is away, or has renewed its token first; the worker may come back at
            # its old address.
            logger.info("cannot ask who serves lanes %s: %s", self.lanes, error)
            return
        groups = group_lanes(self.lanes, endpoints)
        if not groups:
            return
        (endpoint, mine), *others = groups
        unserved = [lane for lane in self.lanes if all(lane not in group for _, group in groups)]
        with self._lock:
            self.endpoint, self.lanes = endpoint, sorted([*mine, *unserved])
        for other_endpoint, lanes in others:
            self._split(lanes, other_endpoint)


def group_lanes(
    lanes: Sequence[Lane], endpoints: Sequence[LaneEndpoint]
) -> list[tuple[str, list[Lane]]]:
    """Return endpoint and lanes of each worker that serves some of `lanes`."""
    groups: dict[str, list[Lane]] = {}
    for endpoint in sorted(endpoints, key=lambda each: each.lane):
        if endpoint.lane in lanes:
            groups.setdefault(endpoint.endpoint, []).append(endpoint.lane)
    return list(groups.items())
