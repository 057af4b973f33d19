"""Kills loader workers of a run at seeded points, starts others in their place, and keeps proof."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

from tests.fakes_consumer import PLENTY_S, ConsumedRun

_LONGEST_WAIT_S = 0.03
_LOOK_EVERY_S = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """What is known of one kill."""

    after_step: int
    """The last step that all ranks had ended when it was ordered."""

    worker_id: str
    pid: int
    exit_status: int
    lanes: tuple[int, ...]
    """That the controller had given to the worker."""

    num_left: int
    """Workers that were enlisted beside it."""


@dataclass
class Killer:
    """Kills workers from which ranks stream at that moment."""

    run: ConsumedRun
    steps: set[int]
    draw: random.Random
    kills: list[Kill] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    orders: SimpleQueue[int | None] = field(default_factory=SimpleQueue)

    def after_step(self, step: int) -> None:
        """Order a kill, if one is due; training does not wait for it."""
        if step in self.steps:
            self.steps.remove(step)  # it may be trained again
            self.orders.put(step)

    def work(self) -> None:
        """Follow the orders until there are no more."""
        for step in iter(self.orders.get, None):
            try:
                # Anywhere in a step: while it is composed, sent, or nothing happens.
                threading.Event().wait(self.draw.uniform(0, _LONGEST_WAIT_S))
                self.kills.append(self._kill_one(step))
            except Exception as error:  # handed on to the test
                self.errors.append(error)

    def _kill_one(self, step: int) -> Kill:
        victim, lanes, num_left = self._victim()
        worker = self.run.workers[victim]
        exit_status = self.run.end_worker(victim, signal.SIGKILL)
        # As Ray restarts an actor under its name, or as another node joins.
        number = len(self.kills)
        self.run.add_worker(victim if self.draw.random() < 0.5 else f"r{number}")
        return Kill(
            after_step=step,
            worker_id=victim,
            pid=worker.process.pid,
            exit_status=exit_status,
            lanes=lanes,
            num_left=num_left,
        )

    def _victim(self) -> tuple[str, tuple[int, ...], int]:
        deadline = time.monotonic() + PLENTY_S
        while time.monotonic() < deadline:
            streaming = self.run.streaming()
            alive = [each for each in self.run.status().workers if each.alive]
            serving = [each for each in alive if each.endpoint in streaming]
            if serving:
                victim = self.draw.choice(serving)
                return victim.worker_id, victim.lanes, len(alive) - 1
            threading.Event().wait(_LOOK_EVERY_S)
        raise AssertionError(f"no rank streams from any worker for {PLENTY_S:g} s")


@contextmanager
def killing(
    run: ConsumedRun, *, num_kills: int, first: int, end: int, seed: int
) -> Iterator[Killer]:
    """Kill after so many steps, drawn from [first, end); at the end all of them have happened."""
    draw = random.Random(seed)
    killer = Killer(run, set(draw.sample(range(first, end), num_kills)), draw)
    thread = threading.Thread(target=killer.work, name="killer", daemon=True)
    thread.start()
    try:
        yield killer
    finally:
        killer.orders.put(None)
        thread.join(2 * PLENTY_S)
    if killer.errors:
        raise killer.errors[0]
