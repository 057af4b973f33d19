"""Who sends which lanes to which rank, followed while it happens from the ranks' event logs."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.rank import EVENTS

Served = tuple[int, int]
"""A rank and one of its lanes."""


@dataclass
class Arrivals:
    """Messages of batches, of ranks that run with `--log-batches`; `read` takes in what is new."""

    out: Path
    """The run's folder."""

    came: dict[Served, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))
    """When (of CLOCK_MONOTONIC) and from which endpoint, in order."""

    _read: dict[Path, int] = field(default_factory=dict)

    def read(self) -> None:
        """Take in what ranks have written since the last time."""
        for path in (self.out / EVENTS).glob("rank*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(whole) + len(newline)
            for event in map(json.loads, whole.splitlines()):
                if event["event"] == "batches":
                    for lane in event["lanes"]:
                        self.came[event["rank"], lane].append((event["time_s"], event["endpoint"]))

    def served_by(self, endpoint: str) -> set[Served]:
        """Return who had the last batches from a worker."""
        return {served for served, came in self.came.items() if came[-1][1] == endpoint}

    def served_again_s(self, served: Served, *, without: str, since_s: float) -> float | None:
        """Return when another worker than `without` first served a lane again; None: not yet."""
        came = self.came[served]
        return next((at for at, by in came if at > since_s and by != without), None)
