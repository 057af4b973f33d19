"""How much each domain helps the others: rewards from the inner products of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.diagnostics import HORIZON
from controller.policy.acodm.moments import RunningMoments
from controller.policy.base import Statistic
from controller.policy.settings import OwnTerm, RewardSettings

ROW_LIMIT = 3.0
"""Standard deviations beyond which a reward normalised across domains is cut off."""


def statistics(settings: RewardSettings) -> frozenset[Statistic]:
    """Return what trainers must measure for the reward."""
    needed = {Statistic.ALIGNMENT}
    if settings.own_term == "debiased":
        needed.add(Statistic.GRADIENT_NOISE)
    return frozenset(needed)


class RewardTracker:
    """Scores a domain by the inner product of its mean gradient with the sum of the others'.

    `own_term` says whether the sum has the domain's own gradient, too.

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
        own_term: OwnTerm,
        smoothing: float,
        normalisation: Literal["over_time", "across_domains"],
        horizon: int,
    ) -> None:
        self._kind = kind
        self._importance = importance
        self._own_term = own_term
        self._smoothing = smoothing
        self._normalisation = normalisation
        self._own = np.zeros((2, num_domains))
        """Smoothed squares of gradients, and of the tokens that they are sums over."""

        self._gram = np.full((num_domains, num_domains), np.nan)
        self._smoothed = np.full(num_domains, np.nan)
        # One mean and variance for all domains, so that what tells them apart is kept.
        self._moments = RunningMoments(1, horizon=horizon)
        self.scores = RunningMoments(num_domains, horizon=HORIZON)
        """[domains]: of the scores before they are smoothed, for diagnosis."""

    def update(self, observation: StepObservation) -> NDArray[np.float64]:
        """Take in a step with an alignment and return the [domains] smoothed rewards."""
        assert observation.alignment is not None
        seen = observation.tokens > 0
        tokens = np.maximum(observation.tokens, 1)
        pairs = np.outer(seen, seen)
        self._gram = np.where(pairs, observation.alignment / np.outer(tokens, tokens), self._gram)
        self._measure_own(observation, tokens)
        scores = self._scores(observation.executed)
        self.scores.update(scores)
        keep = np.where(np.isfinite(self._smoothed), self._smoothing, 0.0)
        blended = keep * np.nan_to_num(self._smoothed) + (1 - keep) * scores
        self._smoothed = np.where(seen, blended, self._smoothed)
        known = np.isfinite(self._smoothed)
        rewards = np.where(known, self._smoothed, self._smoothed[known].mean())
        self._moments.update(rewards[:, None])
        return rewards

    def _measure_own(self, observation: StepObservation, tokens: NDArray[np.int64]) -> None:
        """Take in the squares of the domains' gradients, as far as they count."""
        assert observation.alignment is not None
        squares = np.diag(observation.alignment)
        if self._own_term == "raw":
            measured = np.stack([squares, tokens**2.0])
            self._own = np.where(observation.tokens > 0, measured, self._own)
        norms, parts = observation.part_square_norms, observation.num_parts
        if self._own_term != "debiased" or norms is None or parts is None:
            return
        # Products of different sequences alone, whose noise is independent: n (n - 1) of n^2.
        pairs = parts * (parts - 1.0)
        measured = np.stack([squares - norms, pairs * (tokens / np.maximum(parts, 1)) ** 2])
        # Both are smoothed, so that a step counts by its pairs; one estimate alone is all noise.
        blended = self._smoothing * self._own + (1 - self._smoothing) * measured
        self._own = np.where(pairs > 0, blended, self._own)

    def _scores(self, executed: NDArray[np.float64]) -> NDArray[np.float64]:
        gram = np.nan_to_num(self._gram)  # what was never measured adds nothing
        own = np.divide(self._own[0], self._own[1], out=np.zeros(len(gram)), where=self._own[1] > 0)
        if self._importance == "paper":
            gram, own = gram * np.outer(executed, executed), own * executed**2
        norms = np.sqrt(np.maximum(np.diag(gram), 0))
        if self._kind == "cosine":
            lengths = np.outer(norms, norms)
            gram = np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)
            own = np.divide(own, norms**2, out=np.zeros_like(own), where=norms > 0)
        others = gram - np.diag(np.diag(gram))
        scores: NDArray[np.float64] = others.sum(axis=1) + own
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
        moments = {
            f"{part}.{name}": array
            for part, of_part in (("moments", self._moments), ("scores", self.scores))
            for name, array in of_part.arrays().items()
        }
        held = {"gram": self._gram, "own": self._own, "smoothed": self._smoothed}
        return {**{name: array.copy() for name, array in held.items()}, **moments}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._gram = np.array(arrays["gram"], np.float64)
        self._own = np.array(arrays["own"], np.float64)
        self._smoothed = np.array(arrays["smoothed"], np.float64)
        for part, held in (("moments", self._moments), ("scores", self.scores)):
            held.restore({name: arrays[f"{part}.{name}"] for name in held.arrays()})
