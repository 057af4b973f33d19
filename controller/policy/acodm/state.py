"""What the actor sees of the run: one vector of fixed size a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from protos.errors import ConfigError


def layout(num_domains: int, norm_layers: int) -> dict[str, int]:
    """Return the parts of the vector in their order, and how long each is."""
    return {
        "losses": num_domains,
        "loss_changes": num_domains,
        "log_tokens": num_domains,
        "weight_norms": norm_layers,
        "update_norms": norm_layers,
        "progress": 1,
    }


def state_size(num_domains: int, norm_layers: int) -> int:
    """Return how long the vector is."""
    return sum(layout(num_domains, norm_layers).values())


def norm_places(num_domains: int, norm_layers: int) -> NDArray[np.bool_]:
    """Return [state]: where the norms are."""
    parts = layout(num_domains, norm_layers)
    return np.repeat([name.endswith("_norms") for name in parts], list(parts.values()))


class StateTracker:
    """Builds [losses, their changes, log of tokens so far, norms, update norms, progress].

    Tokens are counted in parts of what the whole run will have had if it goes on at this pace, so
    that they mean the same in runs of all sizes. A domain that a step does not have keeps its last
    loss, with a change of 0; one that no step had yet gets the mean of the others.
    """

    def __init__(self, num_domains: int, norm_layers: int) -> None:
        self._loss = np.full(num_domains, np.nan)
        self._tokens = np.zeros(num_domains, np.int64)
        self._num_steps = 0
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
        self._num_steps += 1
        for row, norms in enumerate((observation.weight_norms, observation.update_norms)):
            # Not every step need be measured: the last norms stay.
            self._norms[row, : len(norms)] = norms
        known = np.isfinite(self._loss)
        expected = self._tokens.sum() * observation.num_steps / self._num_steps
        change = np.where(known & np.isfinite(before), self._loss - before, 0.0)
        return np.concatenate(
            [
                np.where(known, self._loss, self._loss[known].mean()),
                change,
                np.log1p(self._tokens) - np.log1p(expected),
                self._norms.ravel(),
                [(observation.step + 1) / observation.num_steps],
            ]
        ).astype(np.float32)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        return {
            "loss": self._loss.copy(),
            "tokens": self._tokens.copy(),
            "num_steps": np.array(self._num_steps, np.int64),
            "norms": self._norms.copy(),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._loss = np.array(arrays["loss"], np.float64)
        self._tokens = np.array(arrays["tokens"], np.int64)
        self._num_steps = int(arrays["num_steps"])
        self._norms = np.array(arrays["norms"], np.float64)
