"""A run's course in a bounded number of points, however long it is."""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 512
"""Points of a curve: more would not be told apart on a screen. Even, since pairs are merged."""

MAX_CURVES = 16
"""Domains whose curves are sent at once."""

PER_DOMAIN = ("planned", "executed", "loss", "reward")
PER_STEP = ("tokens_per_s", "data_wait_share", "decision_ms", "step_s")

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Point:
    """A step as curves show it. NaN: not known."""

    step: int
    planned: Floats
    executed: Floats
    loss: Floats
    reward: Floats
    """[domains] each."""

    tokens_per_s: float
    data_wait_share: float
    decision_ms: float
    step_s: float


class Series:
    """Means over buckets of equally many steps; the buckets double when there are too many.

    A bucket's mean counts the steps that were added, which of a long run need not be all. One
    thread adds, others read.
    """

    def __init__(self, num_domains: int, *, max_points: int = MAX_POINTS) -> None:
        self.num_domains = num_domains
        self.width = 1
        """Steps of a bucket."""

        self.length = 0
        """Buckets up to the newest that has a step."""

        self.epoch = 0
        """Grows when all buckets change at once: curves that were sent before are void."""

        self.version = 0
        """Grows with each step that is added."""

        self._lock = threading.RLock()
        self._max_points = max_points
        columns = len(PER_DOMAIN) * num_domains + len(PER_STEP)
        self._sums: Floats = np.zeros((max_points, columns))
        self._counts: Floats = np.zeros((max_points, columns))
        self._stamps: NDArray[np.int64] = np.zeros(max_points, np.int64)

    def clear(self) -> None:
        """Forget all: the steps come anew."""
        with self._lock:
            self.width, self.length = 1, 0
            self.epoch += 1
            self.version += 1
            for held in (self._sums, self._counts, self._stamps):
                held[:] = 0

    def add(self, point: Point) -> None:
        """Take a step in."""
        row = np.concatenate([getattr(point, name) for name in PER_DOMAIN])
        row = np.append(row, [getattr(point, name) for name in PER_STEP])
        known = np.isfinite(row)
        with self._lock:
            while point.step // self.width >= self._max_points:
                self._halve()
            index = point.step // self.width
            self._sums[index, known] += row[known]
            self._counts[index, known] += 1
            self.length = max(self.length, index + 1)
            self.version += 1
            self._stamps[index] = self.version

    def _halve(self) -> None:
        half = self._max_points // 2
        for held in (self._sums, self._counts):
            held[:half] = held[0::2] + held[1::2]
            held[half:] = 0
        self._stamps[:] = 0
        self.width *= 2
        self.length = -(-self.length // 2)
        self.epoch += 1

    def news(self, since: int | None, *, most: int) -> dict[str, Any]:
        """Return the buckets that changed after version `since`, at most `most`; None: the newest.

        A bucket is its number and its means as `packed`: each of `PER_DOMAIN`, then `PER_STEP`.
        `gap` says that there were more. `means` are the [domains] shares planned and executed over
        all steps. `version` is what to ask with next.
        """
        with self._lock:
            changed = [self.length - 1] if self.length else []
            is_gap = False
            if since is not None:
                changed = np.flatnonzero(self._stamps[: self.length] > since).tolist()
                is_gap = len(changed) > most
            return {
                "epoch": self.epoch,
                "version": self.version,
                "width": self.width,
                "length": self.length,
                "gap": is_gap,
                "means": self._whole_run(),
                "points": [
                    [index, packed(self._means(slice(index, index + 1))[0])]
                    for index in changed[-most:]
                ],
            }

    def _whole_run(self) -> str:
        first = 2 * self.num_domains
        sums, counts = (
            held[: self.length, :first].sum(axis=0) for held in (self._sums, self._counts)
        )
        return packed(np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0))

    def curves(self, domains: list[int]) -> dict[str, Any]:
        """Return the [points] curves of some domains, and those of the whole run."""
        with self._lock:
            means = self._means(slice(0, self.length))
            shape = {"epoch": self.epoch, "width": self.width, "length": self.length}
        size = self.num_domains
        told: dict[str, Any] = {
            name: [packed(means[:, place * size + domain]) for domain in domains]
            for place, name in enumerate(PER_DOMAIN)
        }
        first = len(PER_DOMAIN) * size
        told.update({name: packed(means[:, first + place]) for place, name in enumerate(PER_STEP)})
        return {**shape, **told}

    def _means(self, rows: slice) -> Floats:
        sums, counts = self._sums[rows], self._counts[rows]
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def packed(values: NDArray[Any]) -> str:
    """Return numbers as base64 of little-endian float32: NaN has a form, and nothing is printed."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
