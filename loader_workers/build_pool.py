"""A small pool of threads that builds what is nearest to need first."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, TypeVar

from protos.errors import NotReady

T = TypeVar("T")

NOW = 0
"""The distance of what somebody waits for."""

_CLOSE_WAIT_S = 2.0
"""How long closing waits for builds that are running."""


class BuildPool(Generic[T]):
    """Runs one build a key at a time, by distance; asking again for a key may bring it nearer.

    caller   call            waits for        woken by
    lane     Future.result   its build        the thread that built it, close
    thread   (its loop)      something to do  submit, close
    """

    def __init__(self, *, threads: int) -> None:
        self._wake = threading.Condition()
        self._queue: list[tuple[int, int, str]] = []
        self._waiting: dict[str, tuple[Callable[[], T], Future[T]]] = {}
        self._running: dict[str, Future[T]] = {}
        self._order = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"shard-builder-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, distance: int, build: Callable[[], T]) -> Future[T]:
        """Return the future of the one build of `key`, queued no farther away than `distance`."""
        with self._wake:
            if self._closed:
                raise NotReady("the loader worker is stopping; ask another")
            running = self._running.get(key)
            if running is not None:
                return running
            future = self._waiting.setdefault(key, (build, Future()))[1]
            # A key may stand in the queue more than once; only its nearest entry finds it waiting.
            heapq.heappush(self._queue, (distance, next(self._order), key))
            self._wake.notify()
            return future

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                key = heapq.heappop(self._queue)[2]
                if key not in self._waiting:
                    continue
                build, future = self._waiting.pop(key)
                self._running[key] = future
            self._settle(key, future, build)
            del future, build

    def _settle(self, key: str, future: Future[T], build: Callable[[], T]) -> None:
        error: BaseException | None = None
        try:
            result = build()
        except BaseException as raised:
            error = raised
        with self._wake:
            # `close` has answered it already, and forgotten it.
            if self._running.pop(key, None) is None:
                return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def close(self) -> None:
        """Start nothing more; those who wait for a build get `NotReady`. Idempotent.

        A build that is running goes on to its end if the process lives, and nobody waits for it
        longer than `_CLOSE_WAIT_S`.
        """
        with self._wake:
            self._closed = True
            abandoned = [future for _, future in self._waiting.values()]
            abandoned += self._running.values()
            self._waiting.clear()
            self._running.clear()
            self._wake.notify_all()
        for future in abandoned:
            future.set_exception(NotReady("the loader worker is stopping; ask another"))
        deadline = time.monotonic() + _CLOSE_WAIT_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def __enter__(self) -> BuildPool[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
