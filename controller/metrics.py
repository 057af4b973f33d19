"""The figures of a run: speed, losses, and how the decisions fared."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from protos.types import StepReport

_SPEED_STEPS = 64
"""Steps over which the speed is measured."""

_PACE_STEPS = 16
"""Steps over which it is measured how long one takes."""

DECISIONS_KEPT = 4096
"""Newest decisions whose times are looked at, so that a status costs as much late in a run as early
in it; `Metrics.decisions` counts all."""

_STEP_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_DECISION_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(kw_only=True, slots=True)
class Totals:
    """What the whole run has come to, over all starts of the controller."""

    tokens: int = 0
    degraded_steps: int = 0
    missing_reports: int = 0
    held_decisions: int = 0
    step_s: float = 0.0
    data_wait_s: float = 0.0
    probe_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return JSON values for the ledger."""
        return {name: getattr(self, name) for name in _TOTALS}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Totals:
        """Return what `as_json` gave."""
        return cls(**values)


class Histogram:
    """How often a value lay below each of a few bounds, since the controller started."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """Of the values up to each bound and above the one before; the last: above all."""

        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


_TOTALS = tuple(field.name for field in dataclasses.fields(Totals))


class Metrics:
    """Collects the figures that `headrace status` shows."""

    def __init__(self, num_domains: int, totals: Totals, *, now: Callable[[], float]) -> None:
        self.totals = totals
        self.loss: NDArray[np.float64] = np.full(num_domains, np.nan)
        """[domains]: nats a token in the newest step that had the domain; NaN: never seen."""

        self.domain_sequences: NDArray[np.int64] = np.zeros(num_domains, np.int64)
        """[domains]: delivered since the controller started."""

        self.domain_tokens: NDArray[np.int64] = np.zeros(num_domains, np.int64)
        """[domains]: labels that counted in the loss, since the controller started."""

        self.steps = Histogram(_STEP_BOUNDS_S)
        """Seconds of each step, of the slowest rank."""

        self.decisions = Histogram(_DECISION_BOUNDS_S)
        """Seconds of each decision, from the last report to the announcement."""

        self.newest_reports: tuple[StepReport, ...] = ()
        """Of the newest step that a rank reported."""

        self._now = now
        self._recent: deque[tuple[float, int]] = deque(maxlen=_SPEED_STEPS)
        self._step_s: deque[float] = deque(maxlen=_PACE_STEPS)
        self._decision_ms: deque[float] = deque(maxlen=DECISIONS_KEPT)

    def step_closed(self, observation: StepObservation, reports: list[StepReport]) -> None:
        """Take in what the ranks reported of a step."""
        tokens = int(observation.tokens.sum())
        self.totals.tokens += tokens
        self.newest_reports = tuple(reports) or self.newest_reports
        self._recent.append((self._now(), tokens))
        slowest_s = max((report.step_s for report in reports), default=0.0)
        self._step_s.append(slowest_s)
        if reports:
            self.steps.add(slowest_s)
        self.domain_sequences += observation.sequences
        self.domain_tokens += observation.tokens
        self.totals.missing_reports += observation.num_missing_ranks
        self.totals.degraded_steps += any(report.degraded for report in reports)
        for name in ("step_s", "data_wait_s", "probe_s"):
            spent = getattr(self.totals, name) + sum(getattr(report, name) for report in reports)
            setattr(self.totals, name, spent)
        loss = observation.loss
        self.loss = np.where(np.isnan(loss), self.loss, loss)

    @property
    def step_s(self) -> float:
        """Return how long a step of the slowest rank takes at present; 0: nobody has said."""
        return sum(self._step_s) / len(self._step_s) if self._step_s else 0.0

    def decided(self, decision_s: float) -> None:
        """Note how long a decision took, from the last report to the announcement."""
        self._decision_ms.append(decision_s * 1000)
        self.decisions.add(decision_s)

    def decision_ms(self, percentile: float) -> float:
        """Return a percentile over the newest `DECISIONS_KEPT` decisions; 0: there was none."""
        if not self._decision_ms:
            return 0.0
        return float(np.percentile(np.asarray(self._decision_ms), percentile))

    @property
    def tokens_per_s(self) -> float:
        """Return the speed over the last steps; 0 before the second."""
        if len(self._recent) < 2:
            return 0.0
        elapsed = self._recent[-1][0] - self._recent[0][0]
        tokens = sum(tokens for _, tokens in self._recent) - self._recent[0][1]
        return tokens / elapsed if elapsed > 0 else 0.0

    @property
    def data_wait_share(self) -> float:
        """Return the share of the ranks' time in which they waited for data."""
        total = self.totals.step_s
        return min(1.0, self.totals.data_wait_s / total) if total > 0 else 0.0
