"""A run's loader workers as Ray actors: as many as are wanted, more or fewer while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from controller.config import RunConfig
from deploy.actors import START_TIMEOUT_S, Say, WatchedActor, stop_actors
from deploy.processes import StopSignals
from loader_workers.actor import LoaderActor
from loader_workers.worker import DRAIN_S, WorkerSettings


class WorkerMaker(Protocol):
    """Makes a worker's actor, wherever it is to be."""

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear which workers are about to be made."""

    def make(self, number: int, settings: WorkerSettings) -> Any:
        """Return the actor of a worker; on a cluster perhaps one that is there already."""

    def gone(self, number: int) -> None:
        """Hear that a worker has been ended."""


class LocalMaker:
    """Makes workers on this machine, whose Ray has a CPU for each that the run begins with."""

    def __init__(self, count: int) -> None:
        self._count = count

    def expect(self, numbers: Sequence[int]) -> None:
        """See `WorkerMaker`."""

    def make(self, number: int, settings: WorkerSettings) -> Any:
        """See `WorkerMaker`."""
        num_cpus = 1 if number < self._count else 0
        return LoaderActor.options(num_cpus=num_cpus, max_restarts=-1).remote(settings)

    def gone(self, number: int) -> None:
        """See `WorkerMaker`."""


class WorkerPool:
    """Workers that share a cache and serve one controller.

    Whoever is to go is asked to leave first: it serves until other workers have its lanes. Only
    then, or after `drain_s`, its process ends.
    """

    def __init__(
        self,
        config: RunConfig,
        address: str,
        cache: Path | None,
        *,
        say: Say,
        maker: WorkerMaker | None = None,
        drain_s: float = DRAIN_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._address = address
        self._cache = config.workers.cache_dir or cache
        self._say = say
        self._maker = maker or LocalMaker(config.workers.count)
        self._drain_s = drain_s
        self._now = now
        self._workers: dict[int, WatchedActor] = {}
        self._leaving: dict[int, tuple[WatchedActor, float]] = {}

    @property
    def size(self) -> int:
        """How many workers there are, without those that leave."""
        return len(self._workers)

    @property
    def workers(self) -> dict[int, WatchedActor]:
        """All workers by number, also those that leave."""
        return {**self._workers, **{number: each for number, (each, _) in self._leaving.items()}}

    def start(self) -> None:
        """Start as many workers as the run file says, and wait until they serve.

        Raises:
            HeadraceError: one cannot serve.
        """
        self.begin(range(self._config.workers.count))
        self.wait_started()

    def begin(self, numbers: Iterable[int]) -> None:
        """Start workers of these numbers, or take them up where they are; returns at once."""
        wanted = list(numbers)
        self._maker.expect(wanted)
        for number in wanted:
            self._workers[number] = self._start(number)

    def wait_started(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until all workers serve, so long for each.

        Raises:
            HeadraceError: one cannot serve, or does not in time.
        """
        for worker in self._workers.values():
            worker.wait_started(timeout_s)

    def _start(self, number: int) -> WatchedActor:
        workers, name = self._config.workers, f"worker-{number}"
        settings = WorkerSettings(
            controller=self._address,
            cache_dir=self._cache,
            cache_bytes=workers.cache_bytes,
            threads=workers.threads,
            worker_id=name,
            run_id=self._config.run,
            managed=True,
            # What workers need of it: not the token that steers the run.
            security=replace(self._config.wire_security, admin_token_file=None),
        )
        actor = self._maker.make(number, settings)
        return WatchedActor(f"loader {name}", actor, ping="stats", say=self._say)

    def scale(self, wanted: int) -> None:
        """Start workers, or ask some to leave, until so many stay; returns at once."""
        before = self.size
        taken = self._workers.keys() | self._leaving.keys()
        free = (number for number in range(len(taken) + wanted) if number not in taken)
        self.begin([next(free) for _ in range(wanted - self.size)])
        while self.size > wanted:
            number = max(self._workers)
            worker = self._workers.pop(number)
            worker.ask_to_leave()
            self._leaving[number] = (worker, self._now() + self._drain_s)
        if before != wanted:
            self._say(f"loader workers: {before} -> {wanted}")

    def look(self) -> None:
        """See, without waiting, how the workers are; end those that have left.

        Raises:
            HeadraceError: one lives and says that it cannot go on.
        """
        for worker in self._workers.values():
            worker.look()
        for number, (worker, deadline) in list(self._leaving.items()):
            worker.look()
            is_late = self._now() >= deadline
            if worker.has_left or is_late:
                del self._leaving[number]
                worker.kill()
                self._maker.gone(number)
                how = f"was ended after {self._drain_s:g} s" if is_late else "has left"
                self._say(f"the {worker.name} {how}")

    def stop(self, stop: StopSignals) -> None:
        """End all workers; those that are dead do no harm."""
        stop_actors(list(self.workers.values()), stop)
