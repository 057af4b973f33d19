"""The few statistics that a comparison needs: curves, crossings, intervals over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_TINY = 1e-300
_PRECISION = 1e-15
_MAX_TERMS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds, with a t interval where there are two or more."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    num: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; without an interval nothing is excluded."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float], *, confidence: float) -> Estimate:
    """Return the mean and its two-sided t interval; the values are taken as independent."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean=mean, sd=None, low=None, high=None, num=len(array))
    sd = float(array.std(ddof=1))
    quantile = t_quantile(0.5 + confidence / 2, degrees=len(array) - 1)
    half = quantile * sd / math.sqrt(len(array))
    return Estimate(mean=mean, sd=sd, low=mean - half, high=mean + half, num=len(array))


@functools.cache
def t_quantile(probability: float, *, degrees: int) -> float:
    """Return the quantile of Student's t distribution, for 0 < probability < 1."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(
            f"probability must be in (0, 1) and degrees at least 1, got {probability}, {degrees}"
        )
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees=degrees)
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * max(high, 1.0):
        middle = (low + high) / 2
        if _t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cdf(value: float, degrees: int) -> float:
    """Return the distribution function at a value of 0 or more."""
    x = degrees / (degrees + value * value)
    return 1 - 0.5 * _incomplete_beta(degrees / 2, 0.5, x)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x))
    # The continued fraction converges quickly on this side of its mean only.
    if x > (a + 1) / (a + b + 2):
        return 1 - front * _beta_fraction(b, a, 1 - x) / b
    return front * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Evaluate the continued fraction by Lentz's method."""
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            result *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return result


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def smoothed(values: Sequence[float] | Vector, window: int) -> Vector:
    """Return the mean of each value and the `window` - 1 before it, of as many as there are.

    A curve is held against another one's end that is smoothed in the same way, so the delay of the
    trailing mean is in both.
    """
    array = np.asarray(values, dtype=np.float64)
    sums = np.cumsum(np.concatenate([np.zeros((1, *array.shape[1:])), array]), axis=0)
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - window, 0)
    counts = (ends - starts).reshape(-1, *([1] * (array.ndim - 1)))
    means: Vector = (sums[ends] - sums[starts]) / counts
    return means


def first_crossing(
    places: Sequence[float] | Vector, values: Sequence[float] | Vector, target: float
) -> float | None:
    """Return the first place at which a falling curve reaches `target`; None: it never does.

    Between two points the curve is a straight line.
    """
    for index, value in enumerate(values):
        if value <= target:
            if index == 0:
                return float(places[0])
            before = float(values[index - 1])
            part = (before - target) / (before - float(value))
            return float(places[index - 1] + part * (places[index] - places[index - 1]))
    return None


def correlation(first: Sequence[float] | Vector, second: Sequence[float] | Vector) -> float | None:
    """Return Pearson's correlation; None with fewer than three pairs or no variation."""
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(one) < 3:
        return None
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float((one @ one) * (other @ other)))
    return float(one @ other) / scale if scale > 0 else None
