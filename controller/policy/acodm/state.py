"""What the actor sees of the run: one vector of fixed size a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from protos.errors import ConfigError


def state_size(num_domains: int, norm_layers: int) -> int:
    """Return how long the vector is."""
    return 3 * num_domains + 2 * norm_layers + 1


class StateTracker:
    """Builds [losses, their changes, log of tokens so far, norms, update norms, progress].

    A domain that a step does not have keeps its last loss, with a change of 0; one that no step had
    yet gets the mean of the others.
    """

    def __init__(self, num_domains: int, norm_layers: int) -> None:
        self._loss = np.full(num_domains, np.nan)
        self._tokens = np.zeros(num_domains, np.int64)
        self._norms = np.zeros((2, norm_layers))

    def check(self, observation: StepObservation) -> None:
        """Refuse an observation that does not fit, before anything changes.

        Raises:
            ConfigError: it has more weight norms than the state has places.
        """
        places = self._norms.shape[1]
        num_norms = max(len(observation.weight_norms), len(observation.update_norms))
        if num_norms > places:
            raise ConfigError(
                f"trainers report the norms of {num_norms} layers at step {observation.step}, "
                f"and policy.norm_layers is {places}; set it to {num_norms} or more"
            )

    def update(self, observation: StepObservation) -> NDArray[np.float32]:
        """Take in a step and return the state after it."""
        seen = observation.tokens > 0
        before = self._loss
        self._loss = np.where(seen, observation.loss, before)
        self._tokens = self._tokens + observation.tokens
        for row, norms in enumerate((observation.weight_norms, observation.update_norms)):
            # Not every step need be measured: the last norms stay.
            self._norms[row, : len(norms)] = norms
        known = np.isfinite(self._loss)
        change = np.where(known & np.isfinite(before), self._loss - before, 0.0)
        return np.concatenate(
            [
                np.where(known, self._loss, self._loss[known].mean()),
                change,
                np.log1p(self._tokens),
                self._norms.ravel(),
                [(observation.step + 1) / observation.num_steps],
            ]
        ).astype(np.float32)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        return {
            "loss": self._loss.copy(),
            "tokens": self._tokens.copy(),
            "norms": self._norms.copy(),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._loss = np.array(arrays["loss"], np.float64)
        self._tokens = np.array(arrays["tokens"], np.int64)
        self._norms = np.array(arrays["norms"], np.float64)
