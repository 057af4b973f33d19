"""A loader worker's side of the control streams, moved by a test; it reads no data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from protos.client import ControlClient, Stream
from protos.spec import RunSpec
from protos.types import EnlistEvent, PlanEvent, WorkerBeat
from tests.fakes_controller import make_beat


class Worker:
    """A loader worker's side of the control streams."""

    def __init__(self, address: str, **beat: Any) -> None:
        """Enlist at `address`, and say `beat` in every beat."""
        self._beat = beat
        self.client = ControlClient(address)
        self._gone = threading.Event()
        self.enlisted: Stream[EnlistEvent] = self.client.enlist(self._beats())
        spec = next(self.enlisted)
        assert isinstance(spec, RunSpec)
        self.spec = spec
        self.plans: Stream[PlanEvent] = self.client.watch_plans("worker-0")

    def _beats(self) -> Iterator[WorkerBeat]:
        yield make_beat(**self._beat)
        while not self._gone.wait(0.05):
            yield make_beat(**self._beat)

    def say(self, **beat: Any) -> None:
        """Change what every later beat says."""
        self._beat = {**self._beat, **beat}

    def hear_through(self, step: int) -> list[PlanEvent]:
        """Return what is heard up to and with the seal of a step."""
        heard = []
        for event in self.plans:
            heard.append(event)
            if event.sealed_through >= step:
                return heard
        raise AssertionError(f"the stream ended after {heard}")

    def close(self) -> None:
        self._gone.set()
        self.enlisted.cancel()
        self.plans.cancel()
        self.client.close()
