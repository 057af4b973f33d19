"""The `align_eg` policy: exponentiated gradient on AC-ODM's reward, the control without learning.

    log w <- (1 - eta lambda) log w + eta lambda log(initial) + eta r;  shares = floor + rest x w

r is AC-ODM's own reward (its smoothing, normalisation and floor included), eta `learning_rate` and
lambda `anchor_weight`. With lambda = 0 it is the rule of DoGE, w <- softmax(log w + eta r), on that
reward. Where it differs from that, and why:

* The pull towards `initial` is AC-ODM's own (`anchor_weight` there): both then have the mixture
  with log w = log(initial) + r / lambda for their aim, and differ only in how they get there. With
  lambda = 0 the domain with the best reward ends with all that the floors leave.
* A step without an alignment (`probe.every_n_steps`) changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from controller.observation import StepObservation
from controller.policy.acodm.initial import initial_shares
from controller.policy.acodm.reward import RewardTracker, statistics
from controller.policy.base import PolicyContext, Statistic
from controller.policy.mixtures import floored
from controller.policy.online import OnlinePolicy, Part
from controller.policy.settings_of_rivals import AlignEgConfig

LEAST_INITIAL = 1e-4
"""Stands for an initial share of 0, from which no multiplication would ever lead away."""


class AlignEgPolicy(OnlinePolicy):
    """Multiplies the shares by what the reward says, and pulls them back to the initial ones."""

    kept_arrays = ("logits",)

    def __init__(self, config: AlignEgConfig, context: PolicyContext) -> None:
        """Begin at the initial mixture.

        Raises:
            ConfigError: the floor is too high for the number of domains.
        """
        shares = initial_shares(config, context)
        super().__init__(config, context, shares)
        self._config = config
        started = np.maximum(shares, LEAST_INITIAL)
        self._anchor = np.log(started / started.sum())
        self._logits = self._anchor.copy()
        self._rewards = RewardTracker(
            self._num_domains,
            kind=config.reward,
            importance=config.importance,
            own_term=config.own_term,
            smoothing=config.reward_smoothing,
            normalisation=config.normalise,
            horizon=config.moments_horizon,
        )

    @property
    def phase(self) -> str:
        """Always the same: there is no warm-up."""
        return "acting"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses and alignment."""
        return frozenset({Statistic.LOSS}) | statistics(self._config)

    def _learn(self, observation: StepObservation) -> None:
        if observation.alignment is None:
            return
        rewards = self._rewards.update(observation).astype(np.float32)
        pull = min(self._config.learning_rate * self._config.anchor_weight, 1.0)
        logits = (1 - pull) * self._logits + pull * self._anchor
        logits = logits + self._config.learning_rate * self._rewards.normalised(rewards[None])[0]
        self._logits = logits - logits.max()
        weights = np.exp(self._logits)
        self._shares = floored(weights / weights.sum(), self._config.floor)

    def _parts(self) -> Mapping[str, Part]:
        return {"rewards": self._rewards}
