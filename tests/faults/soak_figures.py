"""What a soak measures: memory, descriptors and threads of each role, and how they grow.

A process is left out until it has lived for `SETTLED_S`: what it takes to start is no growth.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

MIB = float(1 << 20)
HOUR_S = 3600.0
WARM_S = 600.0
"""The first part of a long soak, in which caches fill; it does not count for slopes."""

SETTLED_S = 30.0
FIGURES = ("rss_mib", "descriptors", "threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One process at one moment."""

    time_s: float
    """Since the soak began."""

    role: str
    pid: int
    age_s: float
    rss_mib: float
    descriptors: int
    threads: int


def look(role: str, pid: int, *, time_s: float) -> Sample | None:
    """Return what a process takes now; None: it has just ended."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return Sample(
                time_s=time_s,
                role=role,
                pid=pid,
                age_s=time.time() - process.create_time(),
                rss_mib=process.memory_info().rss / MIB,
                descriptors=process.num_fds(),
                threads=process.num_threads(),
            )
    except (psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError):
        return None


def slope(times_s: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the growth an hour, by least squares; None: too few points to tell."""
    if len(times_s) < 3 or times_s[-1] - times_s[0] < SETTLED_S:
        return None
    hours: NDArray[np.float64] = np.asarray(times_s) / HOUR_S
    return float(np.polyfit(hours - hours.mean(), np.asarray(values, float), 1)[0])


def growth(samples: Iterable[Sample], *, warm_s: float) -> dict[str, dict[str, Any]]:
    """Return for each role the growth of its longest-lived process, and over all processes."""
    by_role: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.time_s >= warm_s and sample.age_s >= SETTLED_S:
            by_role[sample.role].append(sample)
    return {role: _role_growth(found) for role, found in sorted(by_role.items())}


def _role_growth(samples: Sequence[Sample]) -> dict[str, Any]:
    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.pid].append(sample)
    longest = max(lives.values(), key=lambda life: life[-1].time_s - life[0].time_s)
    return {
        "samples": len(samples),
        "processes": len(lives),
        "all_processes_per_h": _slopes(samples),
        "longest_life_s": round(longest[-1].time_s - longest[0].time_s, 1),
        "longest_life_per_h": _slopes(longest),
        "most": {name: round(max(getattr(each, name) for each in samples), 1) for name in FIGURES},
        "last": {name: round(getattr(samples[-1], name), 1) for name in FIGURES},
    }


def _slopes(samples: Sequence[Sample]) -> dict[str, float | None]:
    times = [sample.time_s for sample in samples]
    found = {name: slope(times, [getattr(each, name) for each in samples]) for name in FIGURES}
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def write_samples(samples: Iterable[Sample], path: Path) -> None:
    """Write one sample a line."""
    path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))


def draw(
    samples: Sequence[Sample], faults: Sequence[Mapping[str, Any]], path: Path, *, title: str
) -> None:
    """Draw each figure over time, a line for each role, a mark for each kill."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(FIGURES), 1, sharex=True, figsize=(9, 8))
    for panel, name in zip(panels, FIGURES, strict=True):
        for role in sorted({sample.role for sample in samples}):
            mine = [sample for sample in samples if sample.role == role]
            minutes = [sample.time_s / 60 for sample in mine]
            panel.plot(minutes, [getattr(each, name) for each in mine], lw=0.8, label=role)
        for fault in faults:
            if fault["kind"].startswith("kill"):
                panel.axvline(fault["time_s"] / 60, color="0.85", lw=0.4, zorder=0)
        panel.set_ylabel(name.replace("_", " "))
        panel.set_ylim(bottom=0)
    panels[0].set_title(title)
    panels[0].legend(ncols=3, fontsize=8)
    panels[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
