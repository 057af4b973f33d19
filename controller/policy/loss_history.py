"""Smoothed losses over a run, in a bounded number of samples however long the run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SAMPLES = 256
"""When there would be more, every second one is dropped, and half as many are taken from then."""

DEGREE = 3
"""Of the polynomial that is fitted to each window (Savitzky-Golay)."""


class LossHistory:
    """Takes in [domains] losses step by step; holds a sample for every `stride` of them.

    A sample is the value at the middle of a cubic fitted to a whole window, so the first and the
    last half window give none.
    """

    def __init__(self, num_domains: int, *, window: int, ignore: int, stride: int) -> None:
        """Expect `window` (odd) losses for a sample, and skip the first `ignore` places."""
        self._window = window
        self._ignore = ignore
        self._stride = stride
        self._kernel = smoothing_kernel(window)
        self._count = 0
        self._num_samples = 0
        self._recent = np.zeros((window, num_domains))
        self._recent_times = np.zeros(window)
        self._samples = np.zeros((MAX_SAMPLES, num_domains))
        self._times = np.zeros(MAX_SAMPLES)
        self._places = np.zeros(MAX_SAMPLES, np.int64)

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return self._num_samples

    @property
    def times(self) -> NDArray[np.float64]:
        """[samples]: when each was."""
        return self._times[: self._num_samples]

    @property
    def losses(self) -> NDArray[np.float64]:
        """[samples, domains]: smoothed losses."""
        return self._samples[: self._num_samples]

    def add(self, time: float, losses: NDArray[np.float64]) -> None:
        """Take in the [domains] losses at `time`, which grows from call to call."""
        self._recent[self._count % self._window] = losses
        self._recent_times[self._count % self._window] = time
        self._count += 1
        place = self._count - 1 - self._window // 2
        if self._count < self._window or place < self._ignore or place % self._stride:
            return
        if self._num_samples == MAX_SAMPLES:
            self._thin()
            if place % self._stride:
                return
        order = np.arange(self._count, self._count + self._window) % self._window
        row = self._num_samples
        self._samples[row] = self._kernel @ self._recent[order]
        self._times[row] = self._recent_times[place % self._window]
        self._places[row] = place
        self._num_samples += 1

    def _thin(self) -> None:
        self._stride *= 2
        kept = np.flatnonzero(self._places[: self._num_samples] % self._stride == 0)
        for array in (self._samples, self._times, self._places):
            array[: len(kept)] = array[kept]
            array[len(kept) :] = 0
        self._num_samples = len(kept)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        return {
            "counts": np.array([self._count, self._num_samples, self._stride], np.int64),
            "recent": self._recent.copy(),
            "recent_times": self._recent_times.copy(),
            "samples": self._samples.copy(),
            "times": self._times.copy(),
            "places": self._places.copy(),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._count, self._num_samples, self._stride = (int(n) for n in arrays["counts"])
        self._recent = np.array(arrays["recent"])
        self._recent_times = np.array(arrays["recent_times"])
        self._samples = np.array(arrays["samples"])
        self._times = np.array(arrays["times"])
        self._places = np.array(arrays["places"])


def smoothing_kernel(window: int) -> NDArray[np.float64]:
    """Return the [window] weights that give a least-squares cubic's value at the middle."""
    half = window // 2
    powers = np.vander(np.arange(-half, half + 1) / max(half, 1), DEGREE + 1, increasing=True)
    kernel: NDArray[np.float64] = np.linalg.pinv(powers)[0]
    return kernel
