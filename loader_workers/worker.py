"""A loader worker: a data server, a shard cache and a session with the controller."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from loader_workers.cache import ShardCache
from loader_workers.convert import Converter
from loader_workers.service import LoaderService
from loader_workers.session import ControllerSession, Inputs
from loader_workers.source import WINDOW_BYTES, WindowSource
from loader_workers.tokenize import make_tokenize
from protos.client import ControlClient
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, IndexMismatch, NotReady
from protos.log_format import set_coordinates
from protos.security import Security, split_address
from protos.server import serving_data
from protos.types import Generation, Quarantine, WorkerBeat

logger = logging.getLogger(__name__)

_QUARANTINES_A_BEAT = 256
_READY_SLICE_S = 0.5
_OPEN_FILES = 65_536

DRAIN_S = 25.0
"""How long a worker that is told to end goes on serving, until its lanes are served elsewhere."""

_QUIET_S = 1.0
"""A worker that leaves is gone from every rank's view when nobody has streamed for so long."""

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What is a worker's own affair; all else comes from the controller."""

    controller: str
    """`host:port`"""

    cache_dir: Path | None = None
    """Where token shards are kept; None: `default_cache_dir()`."""

    cache_bytes: int = 10_000_000_000
    window_bytes: int = WINDOW_BYTES
    """Memory for the joined tokens of windows; those that find no room are gathered each time."""

    threads: int = 1
    """Shards tokenized at once."""

    address: str = "127.0.0.1:0"
    """Where ranks are served; port 0: any free one."""

    advertise: str = ""
    """Host name or address that ranks reach this worker by; empty: that of `address`."""

    worker_id: str = ""
    """Empty: made of host name and process."""

    run_id: str = ""
    """Empty: whichever run the controller has."""

    managed: bool = False
    """Whoever started it also obeys `headrace scale`."""

    security: Security = field(default_factory=Security)

    def __post_init__(self) -> None:
        split_address(self.controller)
        if self.threads < 1 or self.cache_bytes < 0 or self.window_bytes < 0:
            raise ConfigError(
                "workers.threads must be at least 1, workers.cache_bytes and window_bytes not "
                f"negative, got {self.threads}, {self.cache_bytes} and {self.window_bytes}"
            )
        if self.security.calls_tls and not self.security.serves_tls:
            raise ConfigError(
                "ranks that reach the controller over TLS expect it of workers, too: give this "
                "worker a certificate and a key (--cert, --key)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStats:
    """How a worker stands."""

    endpoint: str
    is_ready: bool
    open_streams: int
    sequences_served: int
    stall_s: float
    degraded_steps: int
    cache_bytes: int
    num_quarantined: int
    error: str
    has_left: bool
    """Its lanes are served elsewhere; it may be ended."""


class Worker:
    """A worker's life is its `with` block; `stop` is set when it ends by itself."""

    def __init__(self, settings: WorkerSettings, *, stop: threading.Event) -> None:
        self._settings = settings
        self._stop = stop
        self.worker_id = settings.worker_id or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self.run_id = settings.run_id
        """Of the run that it serves, once it is ready."""

        self._service = LoaderService()
        self._stack = ExitStack()
        self._opened = ExitStack()
        self._cache: ShardCache | None = None
        self._session: ControllerSession | None = None
        self._num_reported = 0
        self._is_leaving = False
        self._streamed_s = 0.0
        self.endpoint = ""

    def __enter__(self) -> Worker:
        settings = self._settings
        _raise_file_limit()
        with ExitStack() as stack:
            bound = stack.enter_context(
                serving_data(self._service, address=settings.address, security=settings.security)
            )
            host, port = split_address(bound)
            self.endpoint = f"{settings.advertise or host}:{port}"
            client = ControlClient(settings.controller, security=settings.security)
            stack.callback(client.close)
            # What `_configure` opens is closed after the session that calls it has ended.
            stack.enter_context(self._opened)
            stack.callback(self._service.stop)
            self._session = ControllerSession(
                client,
                worker_id=self.worker_id,
                beat=self.beat,
                on_inputs=self._configure,
                on_plans=self._service.hear,
                on_end=self._stop.set,
                on_connect=self._report_all_again,
            )
            stack.enter_context(self._session)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def wait_ready(self, *, timeout_s: float) -> None:
        """Wait until the worker can serve, or `stop` is set.

        Raises:
            NotReady: the controller did not answer in time.
            HeadraceError: what ended the worker.
        """
        assert self._session is not None, "a worker waits within its block only"
        deadline = time.monotonic() + timeout_s
        while not self._session.ready.wait(_READY_SLICE_S) and not self._stop.is_set():
            if time.monotonic() >= deadline:
                raise NotReady(
                    f"no run from the controller at {self._settings.controller} within "
                    f"{timeout_s:g} s; is it running there?"
                )
        self.check()

    def leave(self) -> None:
        """Ask the controller to give the lanes to others; serve until then. Twice does no harm."""
        if not self._is_leaving and self._session is not None:
            self._streamed_s = time.monotonic()
            self._is_leaving = True
            self._session.beat_soon()

    def has_left(self) -> bool:
        """Say whether ranks need this worker no more; asked every so often after `leave`."""
        if not self._is_leaving or self._session is None:
            return False
        if not self._session.is_connected:
            # Nobody gives its lanes to others, however long it stays.
            return True
        if self._service.figures().open_streams:
            self._streamed_s = time.monotonic()
        return time.monotonic() - self._streamed_s >= _QUIET_S

    def check(self) -> None:
        """Raise what ended the worker, if something did."""
        if self._session is not None and self._session.error is not None:
            raise self._session.error

    def stats(self) -> WorkerStats:
        """Return how the worker stands."""
        figures, session = self._service.figures(), self._session
        return WorkerStats(
            endpoint=self.endpoint,
            is_ready=session is not None and session.ready.is_set(),
            open_streams=figures.open_streams,
            sequences_served=figures.sequences_served,
            stall_s=figures.stall_s,
            degraded_steps=figures.degraded_steps,
            cache_bytes=self._cache.num_bytes() if self._cache else 0,
            num_quarantined=len(self._cache.quarantines()) if self._cache else 0,
            error=str(session.error) if session is not None and session.error else "",
            has_left=self.has_left(),
        )

    def _configure(self, inputs: Inputs) -> None:
        """Open cache and windows for the run; called once, by the session's thread."""
        spec = inputs.spec
        index = DatasetIndex.from_parquet(inputs.index, source="the controller's dataset index")
        check_tokenized(index, has_tokenizer=bool(inputs.tokenizer))
        converter = Converter.of_run(
            spec, make_tokenize(inputs.tokenizer) if inputs.tokenizer else None
        )
        cache = self._opened.enter_context(
            ShardCache(
                self._settings.cache_dir or default_cache_dir(),
                budget_bytes=self._settings.cache_bytes,
                converter=converter,
                tokenizer_sha256=hashlib.sha256(inputs.tokenizer).hexdigest(),
                threads=self._settings.threads,
            )
        )
        source = self._opened.enter_context(
            WindowSource(spec, index, cache, window_bytes=self._settings.window_bytes)
        )
        self._service.configure(source)
        self._cache = cache
        self.run_id = spec.run_id
        set_coordinates(run=spec.run_id, worker=self.worker_id)
        logger.info("worker %s serves run %s at %s", self.worker_id, spec.run_id, self.endpoint)

    def beat(self) -> WorkerBeat:
        """Return what the worker says of itself now."""
        figures = self._service.figures()
        return WorkerBeat(
            worker_id=self.worker_id,
            endpoint=self.endpoint,
            run_id=self._settings.run_id,
            pid=os.getpid(),
            generation=Generation(figures.generation),
            needed_step=figures.needed_step,
            composed_through=figures.composed_through,
            degraded_steps=figures.degraded_steps,
            cache_bytes=self._cache.num_bytes() if self._cache else 0,
            stall_s=figures.stall_s,
            sequences_served=figures.sequences_served,
            quarantines=self._new_quarantines(),
            leaving=self._is_leaving,
            managed=self._settings.managed,
            starting=self._cache is None,
            heard_epoch=figures.heard_epoch,
            answered=figures.answered,
            sealed_through=figures.sealed_through,
            alone=figures.alone,
        )

    def _new_quarantines(self) -> tuple[Quarantine, ...]:
        """Return what this connection has not said yet, a beat's worth."""
        if self._cache is None:
            return ()
        first = self._num_reported
        new = self._cache.quarantines()[first : first + _QUARANTINES_A_BEAT]
        self._num_reported += len(new)
        return new

    def _report_all_again(self) -> None:
        # The last beats of a connection that broke may not have been heard.
        self._num_reported = 0


def run_worker(
    settings: WorkerSettings,
    *,
    stop: threading.Event,
    hurry: threading.Event,
    drain_s: float = DRAIN_S,
    on_ready: Callable[[str], None] = lambda endpoint: None,
) -> None:
    """Serve until `stop` is set, then for at most `drain_s` until other workers have the lanes.

    `hurry` ends that wait; `on_ready` gets the endpoint once the run is known.

    Raises:
        HeadraceError: what ended the worker before that.
    """
    with Worker(settings, stop=stop) as worker:
        while not stop.is_set():
            try:
                worker.wait_ready(timeout_s=_READY_SLICE_S)
            except NotReady:
                continue
            if not stop.is_set():
                on_ready(worker.endpoint)
            break
        stop.wait()
        worker.check()
        worker.leave()
        deadline = time.monotonic() + drain_s
        while not worker.has_left() and time.monotonic() < deadline:
            if hurry.wait(_LOOK_EVERY_S):
                break


def check_tokenized(index: DatasetIndex, *, has_tokenizer: bool) -> None:
    """Refuse shards of text in a run without a tokenizer.

    Raises:
        IndexMismatch: there is one.
    """
    if has_tokenizer:
        return
    for domain in index.domains:
        for shard in index.shards(domain):
            if shard.format != "tokens" and not shard.quarantined:
                raise IndexMismatch(
                    f"shard {shard.url} of domain {domain!r} holds text, and the run has no "
                    "tokenizer; set data.tokenizer in the run file"
                )


def default_cache_dir() -> Path:
    """Return this user's folder for token shards."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        # Some containers run as a user without a home.
        home = Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"
    return home / "headrace" / "tokens"


def _raise_file_limit() -> None:
    """Allow more open files if the system lets us: each open token shard holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
