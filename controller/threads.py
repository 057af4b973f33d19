"""Work off the event loop: one thread, one thing after the other."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class SingleThread:
    """Runs calls in the order in which they are made, on one thread of its own.

    A daemon thread, unlike those of `concurrent.futures`: a policy that never comes back must not
    keep the controller from ending.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have `call` run after all calls that were made before."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call(*arguments)
            except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(run)
        return future

    async def call(self, call: Callable[..., T], *arguments: Any) -> T:
        """Have `call` run and wait for it; to cancel the wait does not take the call back."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(call, *arguments)))

    def close(self, timeout_s: float) -> bool:
        """Let the calls made so far end; return False if they have not within `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()


class Bell:
    """Wakes one task for what happens on other threads, which are held up by nothing.

    The task arms it, looks, and waits: whatever happens after `arm` wakes it. However often it is
    rung between two looks, its event loop is called once.
    """

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Whom the next ring calls; None: nobody."""

    def arm(self) -> None:
        """Hear what happens from here on; on the loop of the task that waits."""
        self._rung.clear()
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        """Say that something has happened, on any thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            # A loop that has ended wants to hear nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._rung.set)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when it was rung since it was armed, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()


class Signal:
    """Tells any number of waiting tasks that something has changed; none misses a change."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wake all who wait."""
        self.count += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def wait_beyond(self, count: int, timeout_s: float) -> None:
        """Return when there were more changes than `count`, or after `timeout_s`."""
        if self.count > count:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await future
        finally:
            self._waiting.discard(future)
