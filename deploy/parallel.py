"""Applies a function to many items: in turn, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from protos.errors import ConfigError, DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT = 256
"""Tasks that a Ray cluster is given at once."""


class Mapper(Protocol):
    """Yields the results in the items' order; what a call raises is raised."""

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], /
    ) -> Iterable[Result]:
        """Apply `function` to each of `items`."""


def in_turn(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Work here, one after the other."""
    yield from map(function, items)


def choose(num_items: int | None, *, processes: int, ray_address: str | None) -> Mapper:
    """Return the mapper that a command line asks for; `processes` 0: one a core."""
    if ray_address is not None:
        return on_ray(ray_address)
    wanted = processes or len(os.sched_getaffinity(0))
    if num_items is not None:
        wanted = min(wanted, num_items)
    return in_processes(wanted) if wanted > 1 else in_turn


def in_processes(num_processes: int) -> Mapper:
    """Return a mapper over fresh processes of this machine."""

    def mapper(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        if len(items) < 2:
            yield from in_turn(function, items)
            return
        # Not forked: this process may hold threads of a store's connections.
        context = multiprocessing.get_context("spawn")
        count = min(num_processes, len(items))
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            with _children_deaf_to_interrupts():
                futures = deque(pool.submit(function, item) for item in items)
            try:
                while futures:
                    yield futures.popleft().result()
            except BrokenProcessPool as error:
                raise DataError(
                    "a process that read data died (out of memory?); try fewer --processes"
                ) from error
            except KeyboardInterrupt:
                # The pool would wait for what they are at.
                for child in multiprocessing.active_children():
                    child.kill()
                raise
            finally:
                for future in futures:
                    future.cancel()

    return mapper


@contextmanager
def _children_deaf_to_interrupts() -> Iterator[None]:
    """Have processes that start in the block never hear of Ctrl-C, which is this process' affair.

    They inherit what is blocked, and so have no moment in which they would die of it with a
    traceback. Here it waits for the end of the block.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def on_ray(address: str) -> Mapper:
    """Return a mapper over the machines of a Ray cluster."""

    def mapper(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        import ray
        from ray.exceptions import RayTaskError

        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address!r}: {error}") from error
        try:
            task = ray.remote(function)
            waiting = deque(items)
            running: deque[Any] = deque()
            while waiting or running:
                while waiting and len(running) < _IN_FLIGHT:
                    running.append(task.remote(waiting.popleft()))
                yield ray.get(running.popleft())
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        finally:
            ray.shutdown()

    return mapper
