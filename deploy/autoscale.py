"""How many loader workers a run should have, by how long its ranks wait for data."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

GROW_ABOVE = 0.05
"""Share of the ranks' time spent waiting for data beyond which workers are added."""

SHRINK_BELOW = 0.005
"""And the share below which one may go; between the two nothing happens."""

_MAX_PATIENCE = 16
"""How many times longer than at first a calm may have to last before a worker goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the controller said at a time."""

    at_s: float
    wait_s: float
    """Seconds that ranks have waited for data, all ranks and all steps together."""

    step_s: float
    """Seconds that their steps took, with the waits."""


class Autoscaler:
    """Decides from what it is shown; it has no clock.

    It grows by half, at least by one, when ranks have waited for `grow_after_s`, and gives one
    worker back after a calm of `shrink_after_s`. Whenever a worker that was given back is missed
    soon, the next calm must last twice as long. Each change, also an operator's, begins a new
    measurement.
    """

    def __init__(
        self, *, least: int, most: int, grow_after_s: float, shrink_after_s: float
    ) -> None:
        self._least = least
        self._most = most
        self._grow_after_s = grow_after_s
        self._shrink_after_s = shrink_after_s
        self._patience = 1
        self._workers = 0
        self._gave_back_s: float | None = None
        self._samples: deque[Sample] = deque()

    def decide(self, workers: int, sample: Sample) -> int:
        """Return how many workers there should be, where there are so many now."""
        last = self._samples[-1] if self._samples else sample
        if workers != self._workers or sample.step_s < last.step_s:
            # Somebody has changed it, or the controller began anew.
            self._samples.clear()
        self._workers = workers
        self._samples.append(sample)
        wanted = self._wanted(workers, sample)
        if wanted != workers:
            self._samples.clear()
            self._workers = wanted
        self._forget_before(sample.at_s - self._shrink_after_s * self._patience)
        return wanted

    def _wanted(self, workers: int, now: Sample) -> int:
        recent = self._wait_share(now, self._grow_after_s)
        if recent is not None and recent > GROW_ABOVE and workers < self._most:
            self._regret(now)
            return min(self._most, workers + max(1, workers // 2))
        calm = self._wait_share(now, self._shrink_after_s * self._patience)
        if calm is not None and calm < SHRINK_BELOW and workers > self._least:
            self._gave_back_s = now.at_s
            return workers - 1
        return workers

    def _regret(self, now: Sample) -> None:
        """Be slower to give workers back if the last one that went is missed already."""
        soon_s = self._shrink_after_s * self._patience
        if self._gave_back_s is not None and now.at_s - self._gave_back_s < soon_s:
            self._patience = min(2 * self._patience, _MAX_PATIENCE)
        self._gave_back_s = None

    def _wait_share(self, now: Sample, span_s: float) -> float | None:
        """Return the share of waiting over the last `span_s`; None: not known for so long."""
        then = None
        for sample in self._samples:
            if sample.at_s > now.at_s - span_s:
                break
            then = sample
        if then is None or now.step_s <= then.step_s:
            return None
        return (now.wait_s - then.wait_s) / (now.step_s - then.step_s)

    def _forget_before(self, at_s: float) -> None:
        """Drop what no decision looks at any more."""
        while len(self._samples) > 1 and self._samples[1].at_s <= at_s:
            self._samples.popleft()
