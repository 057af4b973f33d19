"""Means and variances over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 5.0
"""Standard deviations beyond which a normalised number is cut off."""

ROUNDING = 1e-6
"""A spread below this part of the mean is rounding, not news."""


class RunningMoments:
    """Of vectors that come one a step; the latest `horizon` steps count most."""

    def __init__(self, size: int, *, horizon: int) -> None:
        self._horizon = horizon
        self._count = np.zeros(size, np.int64)
        self._mean = np.zeros(size)
        self._variance = np.zeros(size)

    def update(
        self, values: NDArray[np.floating[Any]], *, where: NDArray[np.bool_] | None = None
    ) -> None:
        """Take in [size] values, or [any, size] of one step; those `where` says, if it is given."""
        batch = np.atleast_2d(np.asarray(values, np.float64))
        counted = np.ones(len(self._count), np.bool_) if where is None else where
        self._count = self._count + counted
        # The plain mean of all steps at first, then one that forgets.
        part = np.where(counted, 1 / np.clip(self._count, 1, self._horizon), 0.0)
        mean, variance = batch.mean(axis=0), batch.var(axis=0)
        delta = mean - self._mean
        self._variance = (1 - part) * (self._variance + part * delta**2) + part * variance
        self._mean = self._mean + part * delta

    def forget(self, where: NDArray[np.bool_]) -> None:
        """Begin anew with the values that `where` says."""
        for held in (self._count, self._mean, self._variance):
            held[where] = 0

    @property
    def mean(self) -> NDArray[np.float64]:
        """[size]; a copy."""
        return self._mean.copy()

    @property
    def variance(self) -> NDArray[np.float64]:
        """[size]; a copy."""
        return self._variance.copy()

    def normalised(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return [..., size] values less the mean, in standard deviations; 0 if nothing varies."""
        spread = np.sqrt(self._variance)
        varies = spread > ROUNDING * np.abs(self._mean)
        deviation = (values - self._mean) / np.where(varies, spread, np.inf)
        clipped: NDArray[np.float32] = np.clip(deviation, -LIMIT, LIMIT).astype(np.float32)
        return clipped

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        return {
            "count": self._count.copy(),
            "mean": self._mean.copy(),
            "variance": self._variance.copy(),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._count = np.array(arrays["count"], np.int64)
        self._mean = np.array(arrays["mean"], np.float64)
        self._variance = np.array(arrays["variance"], np.float64)
