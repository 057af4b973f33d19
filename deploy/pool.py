"""A run's loader workers as Ray actors: as many as are wanted, more or fewer while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from controller.config import RunConfig
from deploy.actors import Say, WatchedActor, stop_actors
from loader_workers.actor import LoaderActor
from loader_workers.worker import DRAIN_S, WorkerSettings


class WorkerPool:
    """Workers that share a cache and serve one controller.

    Whoever is to go is asked to leave first: it serves until other workers have its lanes. Only
    then, or after `drain_s`, its process ends.
    """

    def __init__(
        self,
        config: RunConfig,
        address: str,
        cache: Path,
        *,
        say: Say,
        drain_s: float = DRAIN_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._address = address
        self._cache = config.workers.cache_dir or cache
        self._say = say
        self._drain_s = drain_s
        self._now = now
        self._workers: dict[int, WatchedActor] = {}
        self._leaving: dict[int, tuple[WatchedActor, float]] = {}

    @property
    def size(self) -> int:
        """How many workers there are, without those that leave."""
        return len(self._workers)

    def start(self) -> None:
        """Start as many workers as the run file says, and wait until they serve.

        Raises:
            HeadraceError: one cannot serve.
        """
        for number in range(self._config.workers.count):
            self._workers[number] = self._start(number, num_cpus=1)
        for worker in self._workers.values():
            worker.wait_started()

    def _start(self, number: int, *, num_cpus: int) -> WatchedActor:
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
        options = LoaderActor.options(num_cpus=num_cpus, max_restarts=-1)  # type: ignore[attr-defined]
        return WatchedActor(f"loader {name}", options.remote(settings), ping="stats", say=self._say)

    def scale(self, wanted: int) -> None:
        """Start workers, or ask some to leave, until so many stay; returns at once."""
        before = self.size
        while self.size < wanted:
            taken = self._workers.keys() | self._leaving.keys()
            number = next(each for each in range(len(taken) + 1) if each not in taken)
            # What Ray counts as cores was counted for the workers that the run began with.
            self._workers[number] = self._start(number, num_cpus=0)
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
                how = f"was ended after {self._drain_s:g} s" if is_late else "has left"
                self._say(f"the {worker.name} {how}")

    def stop(self) -> None:
        """End all workers; those that are dead do no harm."""
        stop_actors([*self._workers.values(), *(worker for worker, _ in self._leaving.values())])
