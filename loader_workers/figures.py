"""A worker's figures for Ray's metrics; deploy/docs/metrics.md lists them. Knows no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from loader_workers.worker import WorkerStats

EVERY_S = 5.0
TAGS = ("run", "worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What is told under a name, to which Ray adds `ray_`."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    what: str
    read: Callable[[WorkerStats], float]


FIGURES = (
    Figure(
        name="headrace_loader_sequences_total",
        kind="counter",
        unit="sequences",
        what="Served since the worker started.",
        read=lambda stats: stats.sequences_served,
    ),
    Figure(
        name="headrace_loader_stall_seconds_total",
        kind="counter",
        unit="seconds",
        what="Waited for its shards.",
        read=lambda stats: stats.stall_s,
    ),
    Figure(
        name="headrace_loader_degraded_steps_total",
        kind="counter",
        unit="steps",
        what="Composed without the controller's word.",
        read=lambda stats: stats.degraded_steps,
    ),
    Figure(
        name="headrace_loader_cache_bytes",
        kind="gauge",
        unit="bytes",
        what="Token shards on its disk.",
        read=lambda stats: stats.cache_bytes,
    ),
    Figure(
        name="headrace_loader_streams",
        kind="gauge",
        unit="streams",
        what="Open to ranks.",
        read=lambda stats: stats.open_streams,
    ),
    Figure(
        name="headrace_loader_quarantined",
        kind="gauge",
        unit="shards and samples",
        what="Left out of the data, as this worker found.",
        read=lambda stats: stats.num_quarantined,
    ),
)


class Recorder(Protocol):
    """Takes figures; in an actor, Ray's counters and gauges."""

    def add(self, name: str, value: float) -> None:
        """Have a counter grow by `value`, which is above 0."""

    def set(self, name: str, value: float) -> None:
        """Have a gauge stand at `value`."""


class Telling:
    """Tells a worker's figures every few seconds, on a thread of its own, until `stop`."""

    def __init__(
        self, stats: Callable[[], WorkerStats], recorder: Recorder, *, stop: threading.Event
    ) -> None:
        self._stats = stats
        self._recorder = recorder
        self._stop = stop
        self._told: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="headrace-figures", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def tell(self) -> Mapping[str, float]:
        """Tell how the worker stands now; return it."""
        stats = self._stats()
        values = {figure.name: float(figure.read(stats)) for figure in FIGURES}
        for figure in FIGURES:
            value = values[figure.name]
            if figure.kind == "gauge":
                self._recorder.set(figure.name, value)
            elif value > self._told.get(figure.name, 0.0):
                self._recorder.add(figure.name, value - self._told.get(figure.name, 0.0))
                self._told[figure.name] = value
        return values

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.tell()
