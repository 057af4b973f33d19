"""A worker's side of Enlist and WatchPlans: settings in, beats out, plans in, over any break."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from protos.client import ControlClient, Stream
from protos.errors import (
    HeadraceError,
    IndexMismatch,
    InvalidMessage,
    NotAuthenticated,
    NotReady,
    Retryable,
    TokenizerInvalid,
    WrongRun,
)
from protos.retry import Retry
from protos.spec import RunSpec
from protos.types import Beat, BlobChunk, EnlistEvent, PlanEvent, WorkerBeat

logger = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
MAX_BLOB_BYTES = 4 << 30
"""Of an index or a tokenizer; more is taken for a mistake, not for data."""


RETRY = Retry(max_wait_s=1.0)
"""Both streams may be opened again at any time: Enlist is idempotent by worker id. Tries stay close
together, since a controller that comes back decides nothing before it has heard its workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a worker gets from the controller before it can serve."""

    spec: RunSpec
    index: bytes
    tokenizer: bytes
    """Empty: the run has none."""


class BlobCollector:
    """Puts the chunks of the index and the tokenizer together and checks their hashes."""

    def __init__(self) -> None:
        self._spec: RunSpec | None = None
        self._parts: dict[str, bytearray] = {}
        self._done: dict[str, bytes] = {}

    def begin(self, spec: RunSpec) -> Inputs | None:
        """Forget what was collected for a connection that broke."""
        self._spec, self._parts, self._done = spec, {}, {}
        if not spec.tokenizer_sha256:
            self._done["tokenizer"] = b""
        return None

    def add(self, chunk: BlobChunk) -> Inputs | None:
        """Take a chunk; return everything once it is complete.

        Raises:
            InvalidMessage: chunks are out of order or too large.
            IndexMismatch: the index has another hash than the run says.
            TokenizerInvalid: the tokenizer has another hash than the run says.
        """
        spec = self._spec
        if spec is None or chunk.name not in ("index", "tokenizer"):
            raise InvalidMessage(f"a chunk of {chunk.name!r} came before the run's settings")
        part = self._parts.setdefault(chunk.name, bytearray())
        end = chunk.offset + len(chunk.data)
        if chunk.offset != len(part) or not end <= chunk.total_bytes <= MAX_BLOB_BYTES:
            raise InvalidMessage(
                f"a chunk of the {chunk.name} covers bytes {chunk.offset}..{end} of "
                f"{chunk.total_bytes}, {len(part)} are there"
            )
        part += chunk.data
        if len(part) < chunk.total_bytes:
            return None
        data = bytes(self._parts.pop(chunk.name))
        is_index = chunk.name == "index"
        expected = spec.index_sha256 if is_index else spec.tokenizer_sha256
        if hashlib.sha256(data).hexdigest() != expected:
            error = IndexMismatch if is_index else TokenizerInvalid
            raise error(f"the {chunk.name} from the controller is not the one that the run names")
        self._done[chunk.name] = data
        if self._done.keys() != {"index", "tokenizer"}:
            return None
        return Inputs(spec=spec, index=self._done["index"], tokenizer=self._done["tokenizer"])


class ControllerSession:
    """Two threads that keep Enlist and WatchPlans open, until `close` or a final error.

    thread  does                                      waits for                     woken by
    enlist  sends beats, takes settings and blobs     the stream's next event       close, a break
    beats   (gRPC's) yields a beat a second           beat_soon, 1 s                close, a break
    watch   hands on plans, once the worker is ready  `ready`, then the next event  close, a break
    """

    def __init__(
        self,
        client: ControlClient,
        *,
        worker_id: str,
        beat: Callable[[], WorkerBeat],
        on_inputs: Callable[[Inputs], None],
        on_plans: Callable[[PlanEvent], None],
        on_connect: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._client = client
        self._worker_id = worker_id
        self._beat = beat
        self._on_inputs = on_inputs
        self._on_plans = on_plans
        self._on_connect = on_connect
        self._on_end = on_end
        self._lock = threading.Lock()
        self._streams: set[Stream[Any]] = set()
        self._stopping = threading.Event()
        self._is_back = threading.Event()
        """Set when the controller answers: whoever waits to try again need not wait longer."""

        self._blobs = BlobCollector()
        self._spec: RunSpec | None = None
        self.ready = threading.Event()
        """Set once the worker has all it needs to serve."""

        self.draining = False
        """The controller said that the run is over."""

        self.is_connected = False
        """The controller has answered, and the stream has not broken since."""

        self._beat_soon = threading.Event()
        self.error: HeadraceError | None = None
        """What ended the session for good."""

        self._threads = [
            threading.Thread(target=self._keep, args=(name, once), name=name, daemon=True)
            for name, once in (("enlist", self._enlist_once), ("watch", self._watch_once))
        ]

    def __enter__(self) -> ControllerSession:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def beat_soon(self) -> None:
        """Send the next beat at once."""
        self._beat_soon.set()

    def close(self) -> None:
        """End both streams and their threads; idempotent."""
        self._stopping.set()
        self._is_back.set()
        self._beat_soon.set()
        self.ready.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _keep(self, name: str, once: Callable[[], bool]) -> None:
        num_tries = 0
        while not self._stopping.is_set():
            try:
                heard = once()
                reason = "the controller ended the stream"
            except Retryable as error:
                heard, reason = False, str(error)
            except HeadraceError as error:
                # A token that was good may have been renewed at the controller first.
                if not (isinstance(error, NotAuthenticated) and self.ready.is_set()):
                    self._end(error)
                    return
                heard, reason = False, str(error)
            except Exception as error:
                logger.exception("%s failed unexpectedly worker=%s", name, self._worker_id)
                self._end(InvalidMessage(f"{name} failed: {error}"))
                return
            if self._stopping.is_set():
                return
            num_tries = 1 if heard else num_tries + 1
            # Said once for each time that the controller goes away, not at every try.
            level = logging.INFO if num_tries == 1 else logging.DEBUG
            logger.log(level, "%s broke worker=%s: %s", name, self._worker_id, reason)
            self._is_back.wait(RETRY.wait_s(num_tries))
            self._is_back.clear()

    def _end(self, error: HeadraceError) -> None:
        self.error = error
        self._stopping.set()
        self._is_back.set()
        self.ready.set()
        self._on_end()

    def _enlist_once(self) -> bool:
        over = threading.Event()
        heard = False
        self._on_connect()
        try:
            for event in self._events(self._client.enlist(self._beats(over))):
                if not heard:
                    self._is_back.set()
                heard = self.is_connected = True
                self._take(event)
        except Retryable:
            if not heard:
                raise
        finally:
            self.is_connected = False
            over.set()
            self._beat_soon.set()
        return heard

    def _watch_once(self) -> bool:
        self.ready.wait()
        heard = False
        if self._stopping.is_set():
            return heard
        try:
            events = self._client.watch_plans(self._worker_id, answers=True)
            for event in self._events(events):
                self._on_plans(event)
                heard = True
                if event.asked or event.reset:
                    # The controller waits to hear how far this worker has gone, alone or not.
                    self._beat_soon.set()
        except InvalidMessage as error:
            # Plans that do not follow from those held: a new stream brings all of them again.
            raise NotReady(f"plans were refused, asking for all of them again: {error}") from error
        except Retryable:
            if not heard:
                raise
        return heard

    def _events(self, stream: Stream[Any]) -> Iterator[Any]:
        with self._lock:
            self._streams.add(stream)
        try:
            # Whoever stops before the stream is among those to cancel would miss it.
            if not self._stopping.is_set():
                yield from stream
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.cancel()

    def _beats(self, over: threading.Event) -> Iterator[WorkerBeat]:
        while not over.is_set() and not self._stopping.is_set():
            yield self._beat()
            self._beat_soon.wait(BEAT_EVERY_S)
            self._beat_soon.clear()

    def _take(self, event: EnlistEvent) -> None:
        if isinstance(event, Beat):
            self.draining = event.drain
        elif isinstance(event, RunSpec):
            self._check_same_run(event)
            self._blobs.begin(event)
        elif not self.ready.is_set():
            inputs = self._blobs.add(event)
            if inputs is not None:
                self._on_inputs(inputs)
                self._spec = inputs.spec
                self.ready.set()
                # Lanes are given only to workers that say so.
                self._beat_soon.set()

    def _check_same_run(self, spec: RunSpec) -> None:
        mine = self._spec
        if mine is None:
            return
        # Data that has moved has the same order, but this worker looks for it where it was.
        is_same_data = spec.index_sha256 == mine.index_sha256
        is_same_run = spec.run_id == mine.run_id and spec.order_sha256() == mine.order_sha256()
        if not is_same_run or not is_same_data:
            raise WrongRun(
                f"the controller now has run {spec.run_id!r} with other settings than run "
                f"{mine.run_id!r} that this worker serves; start the worker again"
            )
