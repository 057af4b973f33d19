"""Remembered transitions: a ring that forgets the oldest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NO_STEP = -2
"""Neither a step nor the one before a step."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Transitions:
    """Rows of the ring, not normalised."""

    states: NDArray[np.float32]
    """[rows, state]: before the step."""

    mixtures: NDArray[np.float32]
    """[rows, domains]: what was carried out in the step."""

    rewards: NDArray[np.float32]
    """[rows, domains]"""

    next_states: NDArray[np.float32]
    """[rows, state]: after the step."""

    next_mixtures: NDArray[np.float32]
    """[rows, domains]: carried out in the step after; the step's own where that is not known."""


class Replay:
    """A ring of transitions."""

    def __init__(self, *, capacity: int, state_size: int, num_domains: int) -> None:
        self._capacity = capacity
        self._rows = Transitions(
            states=np.zeros((capacity, state_size), np.float32),
            mixtures=np.zeros((capacity, num_domains), np.float32),
            rewards=np.zeros((capacity, num_domains), np.float32),
            next_states=np.zeros((capacity, state_size), np.float32),
            next_mixtures=np.zeros((capacity, num_domains), np.float32),
        )
        self._num_pushed = 0
        self._last_step = _NO_STEP

    def __len__(self) -> int:
        return min(self._num_pushed, self._capacity)

    def push(
        self,
        step: int,
        *,
        state: NDArray[np.float32],
        mixture: NDArray[np.float64],
        rewards: NDArray[np.float64],
        next_state: NDArray[np.float32],
    ) -> None:
        """Remember what happened at `step`."""
        row = self._num_pushed % self._capacity
        self._rows.states[row] = state
        self._rows.mixtures[row] = mixture
        self._rows.rewards[row] = rewards
        self._rows.next_states[row] = next_state
        self._rows.next_mixtures[row] = mixture
        self._num_pushed += 1
        self._last_step = step

    def follow(self, step: int, mixture: NDArray[np.float64]) -> None:
        """Say what was carried out at `step`, for the transition of the step before."""
        if step == self._last_step + 1:
            self._rows.next_mixtures[(self._num_pushed - 1) % self._capacity] = mixture

    def rows(self, indices: NDArray[np.int64]) -> Transitions:
        """Return copies of rows 0 .. len - 1."""
        return Transitions(**{name: array[indices] for name, array in self._arrays().items()})

    def _arrays(self) -> dict[str, NDArray[np.float32]]:
        return {name: getattr(self._rows, name) for name in Transitions.__slots__}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        filled = {name: array[: len(self)].copy() for name, array in self._arrays().items()}
        return {**filled, "position": np.array([self._num_pushed, self._last_step], np.int64)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._num_pushed, self._last_step = (int(number) for number in arrays["position"])
        for name, array in self._arrays().items():
            array[: len(self)] = arrays[name]
