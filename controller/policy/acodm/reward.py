"""How much each domain helps the others: rewards from the inner products of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.moments import RunningMoments

ROW_LIMIT = 3.0
"""Standard deviations beyond which a reward normalised across domains is cut off."""


class RewardTracker:
    """Scores a domain by the inner product of its mean gradient with the sum of the others'.

    With `own_term` the sum has the domain's own gradient, too.

    Means, not sums: reports hold sums over tokens, by which a domain would score for being drawn
    often. Inner products of domains that a step does not have keep their last value, and so does
    the smoothed reward of such a domain; one that no step had yet gets the mean of the others.
    """

    def __init__(
        self,
        num_domains: int,
        *,
        kind: Literal["dot", "cosine", "paper"],
        importance: Literal["none", "paper"],
        own_term: bool,
        smoothing: float,
        normalisation: Literal["over_time", "across_domains"],
        horizon: int,
    ) -> None:
        self._kind = kind
        self._importance = importance
        self._own_term = own_term
        self._smoothing = smoothing
        self._normalisation = normalisation
        self._gram = np.full((num_domains, num_domains), np.nan)
        self._smoothed = np.full(num_domains, np.nan)
        # One mean and variance for all domains, so that what tells them apart is kept.
        self._moments = RunningMoments(1, horizon=horizon)

    def update(self, observation: StepObservation) -> NDArray[np.float64]:
        """Take in a step with an alignment and return the [domains] smoothed rewards."""
        assert observation.alignment is not None
        seen = observation.tokens > 0
        tokens = np.maximum(observation.tokens, 1)
        pairs = np.outer(seen, seen)
        self._gram = np.where(pairs, observation.alignment / np.outer(tokens, tokens), self._gram)
        scores = self._scores(observation.executed)
        keep = np.where(np.isfinite(self._smoothed), self._smoothing, 0.0)
        blended = keep * np.nan_to_num(self._smoothed) + (1 - keep) * scores
        self._smoothed = np.where(seen, blended, self._smoothed)
        known = np.isfinite(self._smoothed)
        rewards = np.where(known, self._smoothed, self._smoothed[known].mean())
        self._moments.update(rewards[:, None])
        return rewards

    def _scores(self, executed: NDArray[np.float64]) -> NDArray[np.float64]:
        gram = np.nan_to_num(self._gram)  # what was never measured adds nothing
        if self._importance == "paper":
            gram = gram * np.outer(executed, executed)
        norms = np.sqrt(np.maximum(np.diag(gram), 0))
        if self._kind == "cosine":
            lengths = np.outer(norms, norms)
            gram = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
        counted = gram if self._own_term else gram - np.diag(np.diag(gram))
        scores: NDArray[np.float64] = counted.sum(axis=1)
        if self._kind == "dot" and norms.any():
            scores = scores / norms[norms > 0].mean()
        if self._importance == "paper":
            scores = np.divide(scores, executed, out=np.zeros_like(scores), where=executed > 0)
        return scores

    def normalised(self, rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return [rows, domains] rewards on a scale that a critic can learn."""
        if self._normalisation == "over_time":
            return self._moments.normalised(rewards)
        centred = rewards - rewards.mean(axis=1, keepdims=True)
        spread = rewards.std(axis=1, keepdims=True)
        scores: NDArray[np.float32] = np.divide(
            centred, spread, out=np.zeros_like(centred), where=spread > 0
        )
        return np.clip(scores, -ROW_LIMIT, ROW_LIMIT)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        moments = {f"moments.{name}": array for name, array in self._moments.arrays().items()}
        return {"gram": self._gram.copy(), "smoothed": self._smoothed.copy(), **moments}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._gram = np.array(arrays["gram"], np.float64)
        self._smoothed = np.array(arrays["smoothed"], np.float64)
        self._moments.restore({name: arrays[f"moments.{name}"] for name in self._moments.arrays()})
