"""One stream of some lanes' batches over a range of steps, kept going over breaks."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from protos.client import DataClient, Stream
from protos.errors import NotAuthenticated, Retryable, WorkerUnreachable
from protos.retry import Retry
from protos.types import Credit, Lane, LaneEndpoint, OpenStream, Step, StepBatch
from trainer_client.joining import Membership
from trainer_client.step_buffer import StepBuffer

logger = logging.getLogger(__name__)

_RETRY = Retry(first_wait_s=0.05, max_wait_s=1.0)
_TURN_SLICE_S = 0.5


_CREDITS_A_ROUND = 4
"""Messages that say how far the trainer has come, for as many steps as are asked for ahead."""


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
    """Fills the buffer with the steps [first_step, end_step) of lanes that one worker serves.

    When the stream breaks, `relocate` says where it goes on, or puts other streams in its place;
    then it is opened again from the next step that the buffer does not hold.
    """

    def __init__(
        self,
        *,
        lanes: Sequence[Lane],
        endpoint: str,
        steps: range,
        member: Membership,
        buffer: StepBuffer,
        prefetch_steps: int,
        documents: bool,
        relocate: Callable[[LaneStream], None],
    ) -> None:
        super().__init__(name=f"headrace-lanes-{lanes[0]}-{lanes[-1]}", daemon=True)
        self.lanes = tuple(lanes)
        self.endpoint = endpoint
        self.cause: Retryable | None = None
        """Why the stream does not run at the moment; None: it runs."""

        self.steps = steps
        """What it serves; `end_at` brings the end forward."""

        self._member = member
        self._buffer = buffer
        self._prefetch_steps = prefetch_steps
        self._documents = documents
        self._relocate = relocate
        self._credits_apart = max(prefetch_steps // _CREDITS_A_ROUND, 1)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._credits = _Credits()
        self._granted_through = steps.start - 1
        self._consumed_through = member.first_step - 1
        self._needed_step = -1
        self._stream: Stream[StepBatch] | None = None

    @property
    def next_step(self) -> Step:
        """The step that this stream delivers next."""
        return Step(max(self.steps.start, self._buffer.next_step(self.lanes[0])))

    def is_over(self) -> bool:
        """Whether it delivers nothing more: its steps are there, or it was stopped."""
        return self._stopping.is_set() or self.next_step >= self.steps.stop

    def tell(self, *, consumed_through: int, needed_step: int = -1) -> None:
        """Say what the trainer consumed, and which step it waits for (-1: none)."""
        with self._lock:
            self._consumed_through = consumed_through
            last = self._last_granted()
            more = last - self._granted_through
            # Credits for short steps go together, those for the last steps at once.
            if (
                more >= (1 if last == self.steps.stop - 1 else self._credits_apart)
                or needed_step != self._needed_step
            ):
                self._needed_step = needed_step
                self._granted_through += max(more, 0)
                self._credits.put(Credit(steps=max(more, 0), needed_step=needed_step))

    def _last_granted(self) -> int:
        """Return the last step that may be sent now; `_lock` is held."""
        return min(self._consumed_through + self._prefetch_steps, self.steps.stop - 1)

    def end_at(self, step: Step) -> None:
        """Serve no step from `step` on, none of which has been granted yet."""
        with self._lock:
            assert self._granted_through < max(step, self.steps.start)
            self.steps = range(self.steps.start, min(self.steps.stop, step))

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
        """Stream until the last step, `stop`, or an error that trying again cannot mend."""
        try:
            self._keep_streaming()
        except Exception as error:
            # Whatever it is, the trainer that waits for these lanes must hear of it.
            self._buffer.fail(error)

    def _keep_streaming(self) -> None:
        num_tries = 0
        while not self.is_over():
            before = self.next_step
            try:
                self._stream_once()
                cause: Retryable = WorkerUnreachable(f"{self.endpoint} ended the stream")
            except Retryable as error:
                cause = error
            except NotAuthenticated as error:
                # The worker took this token before: it was renewed there first.
                cause = WorkerUnreachable(f"{self.endpoint} lets nobody in: {error}")
            if self.is_over():
                return
            num_tries = 1 if self.next_step > before else num_tries + 1
            self.cause = cause
            # A worker that stays away is said once, not at every try.
            logger.log(
                logging.WARNING if num_tries == 1 else logging.DEBUG,
                "stream of lanes %s broke rank=%d step=%d: %s",
                self.lanes,
                self._member.rank,
                self.next_step,
                cause,
            )
            self._stopping.wait(_RETRY.wait_s(num_tries))
            if not self.is_over():
                self._relocate(self)

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
            for number, batch in enumerate(stream):
                if number == 0 and not self._wait_turn():
                    return
                self._buffer.put(batch, self.lanes)
                self.cause = None
                if self.is_over():
                    return
        finally:
            with self._lock:
                stream_now, self._stream = self._stream, None
            if stream_now is not None:
                stream_now.cancel()
            credits.end()
            client.close()

    def _wait_turn(self) -> bool:
        """Wait for the worker that serves the lanes up to this stream's start; False: stopped."""
        while not self._stopping.is_set():
            if self._buffer.wait_turn(self.lanes, self.steps.start, timeout_s=_TURN_SLICE_S):
                return True
        return False

    def _open(self) -> tuple[OpenStream, _Credits]:
        member = self._member
        from_step = self.next_step
        places = {lane: self._buffer.place(lane) for lane in self.lanes}
        with self._lock:
            self._granted_through = max(self._last_granted(), from_step - 1)
            opening = OpenStream(
                run_id=member.spec.run_id,
                generation=member.generation,
                rank=member.rank,
                from_step=from_step,
                first_slot=member.slots.start,
                end_slot=member.slots.stop,
                cursors={lane: cursor for lane, (cursor, _) in places.items()},
                cursor_steps={lane: step for lane, (_, step) in places.items()},
                credits=self._granted_through + 1 - from_step,
                documents=self._documents,
                most_steps=self._credits_apart,
            )
            self._credits = _Credits()
            if self._needed_step >= from_step:
                self._credits.put(Credit(needed_step=self._needed_step))
            return opening, self._credits


def group_lanes(
    lanes: Sequence[Lane], endpoints: Sequence[LaneEndpoint]
) -> list[tuple[str, list[Lane]]]:
    """Return endpoint and lanes of each worker that serves some of `lanes`."""
    groups: dict[str, list[Lane]] = {}
    for endpoint in sorted(endpoints, key=lambda each: each.lane):
        if endpoint.lane in lanes:
            groups.setdefault(endpoint.endpoint, []).append(endpoint.lane)
    return list(groups.items())
