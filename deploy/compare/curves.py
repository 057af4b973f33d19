"""A trial's record as curves and figures, in the metrics by which arms are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deploy.compare.pilot import entropy
from deploy.compare.record import TrialRecord
from deploy.compare.statistics import correlation, first_crossing, smoothed

Vector = NDArray[np.float64]

MACRO = "macro"
NATURAL = "natural"
WORST = "worst"
REGRET = "regret"

METRIC_NAMES = {
    MACRO: "mean over domains of the test loss",
    NATURAL: "mean of the test loss weighted by the domains' natural shares",
    WORST: "test loss of the worst domain",
    REGRET: "greatest excess of a domain's test loss over that of `natural`",
}
"""All in nats a token, smaller is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """Where a trial first was as good as a target."""

    steps: float
    tokens: float
    wall_s: float
    cpu_s: float


class TrialCurves:
    """The smoothed curves of a trial."""

    def __init__(self, record: TrialRecord, *, window: int) -> None:
        self.record = record
        self._raw = np.asarray([each.test_loss for each in record.evaluations])
        self.losses: Vector = smoothed(self._raw, window)
        """[evaluations, domains]"""

        self.steps: Vector = np.asarray([each.step for each in record.evaluations], np.float64)
        self._wall = np.asarray([each.wall_s for each in record.evaluations])
        self._cpu = np.asarray([each.cpu_s for each in record.evaluations])

    def curve(self, metric: str) -> Vector:
        """Return [evaluations] values of `macro`, `natural` or `worst`."""
        if metric == MACRO:
            means: Vector = self.losses.mean(axis=1)
            return means
        if metric == NATURAL:
            weighted: Vector = self.losses @ np.asarray(self.record.natural)
            return weighted
        assert metric == WORST, metric
        worst: Vector = self.losses.max(axis=1)
        return worst

    def final(self, metric: str, natural: TrialCurves | None = None) -> float | None:
        """Return the last value of a metric; None: `regret` without a trial of `natural`."""
        if metric != REGRET:
            return float(self.curve(metric)[-1])
        if natural is None:
            return None
        return float((self.losses[-1] - natural.losses[-1]).max())

    def reach(self, metric: str, target: float) -> Reached | None:
        """Return where a metric's curve first reaches `target`; None: nowhere."""
        curve = self.curve(metric)
        steps = first_crossing(self.steps, curve, target)
        if steps is None:
            return None
        return Reached(
            steps=steps,
            tokens=steps * self.record.tokens_a_step,
            wall_s=float(np.interp(steps, self.steps, self._wall)),
            cpu_s=float(np.interp(steps, self.steps, self._cpu)),
        )

    @cached_property
    def executed(self) -> Vector:
        """[domains]: mean share of the sequences over the trial."""
        weights = np.asarray([each.num_steps for each in self.record.intervals], np.float64)
        table = np.asarray([each.executed for each in self.record.intervals])
        mean: Vector = weights @ table / weights.sum()
        return mean

    def entropy(self) -> float:
        """Return the mean entropy of the planned mixtures, over that of the uniform one."""
        weights = [each.num_steps for each in self.record.intervals]
        values = [entropy(np.asarray(each.planned)) for each in self.record.intervals]
        return float(np.average(values, weights=weights))

    def reward_snr(self) -> float | None:
        """Return how far the domains' rewards differ over how far each varies by the step."""
        ratios = [
            each.reward_spread / each.reward_noise
            for each in self.record.intervals
            if each.reward_spread is not None and each.reward_noise
        ]
        return float(np.mean(ratios)) if ratios else None

    def reward_foresight(self) -> float | None:
        """Return how far the rewards foretell the next window's decrease of the macro loss.

        The correlation over windows of a domain's mean reward with the decrease in the window
        after, both without their linear trend (each falls with time whatever the rewards are
        worth), averaged over the domains.
        """
        rewards = _table([each.reward for each in self.record.intervals])
        decrease = -np.diff(self._raw.mean(axis=1))
        if rewards is None or len(rewards) < 4:
            return None
        now, following = rewards[:-1], decrease[1:]
        found = [
            correlation(_detrended(column), _detrended(following))
            for column in now.T
            if np.isfinite(column).all()
        ]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else None

    def diagnostics(self) -> dict[str, float]:
        """Return the means of what the policy told of itself, over the second half."""
        half = self.record.intervals[len(self.record.intervals) // 2 :]
        names = sorted({name for each in half for name in each.diagnostics})
        return {
            name: float(
                np.mean([each.diagnostics[name] for each in half if name in each.diagnostics])
            )
            for name in names
        }


def _table(rows: Sequence[Sequence[float | None]]) -> Vector | None:
    if not rows:
        return None
    table = np.asarray(
        [[np.nan if value is None else value for value in row] for row in rows], np.float64
    )
    return table if np.isfinite(table).any() else None


def _detrended(values: Vector) -> Vector:
    places = np.arange(len(values), dtype=np.float64)
    slope, start = np.polyfit(places, values, 1)
    rest: Vector = values - (start + slope * places)
    return rest
