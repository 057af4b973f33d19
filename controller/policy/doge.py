"""The `doge` policy: shares by how well a domain's gradient generalises (2310.15393).

The run is DoGE's proxy run. In each step, with g the domains' mean gradients,

    s = clip(g_k . sum_j g_j / mean |g|, 0, 5);  w <- softmax(log w + eta s)

from w = 1 / domains. Its result is the mean of w over time: the state holds it as `final`, and
`replay_mean` takes it from there. Where it differs from the published code, and why:

* Sequences are sampled by w, where the code samples evenly and weighs losses by w: the gradient is
  the same in expectation, and mixtures are what this service carries out. So that every domain goes
  on being measured, none gets less than `floor`.
* eta is a constant in the place of the code's lr / mu: the controller is not told the trainer's
  learning rate. 0.05 is 5e-4 / 0.01.
* Gradients are those of the watched layers, sketched, from one backward pass over all domains; the
  code has one backward pass a domain, over all parameters, each clipped to a norm of 5.
* The product of a domain's gradient with itself counts, as in the code as it runs (the text leaves
  it out where the training and target domains are the same): `own_term`.
* A domain that a step does not have keeps its last products, as in the code; one that none had yet
  gets the mean score of the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.reward import RewardTracker
from controller.policy.base import PolicyContext, Statistic
from controller.policy.mixtures import check_floor, floored
from controller.policy.online import OnlinePolicy, Part
from controller.policy.settings_of_rivals import DogeConfig

MAX_SCORE = 5.0


class DogePolicy(OnlinePolicy):
    """Exponentiated gradient on the published score."""

    kept_arrays = ("logits", "mean")
    kept_values = ("num_observed",)

    def __init__(self, config: DogeConfig, context: PolicyContext) -> None:
        """Begin with an even mixture.

        Raises:
            ConfigError: the floor is too high for the number of domains.
        """
        num_domains = len(context.domains)
        check_floor(config.floor, num_domains)
        super().__init__(config, context, np.full(num_domains, 1 / num_domains))
        self._config = config
        self._logits = np.zeros(num_domains)
        self._mean = np.zeros(num_domains)
        self._num_observed = 0
        self._scores = RewardTracker(
            num_domains,
            kind="dot",
            importance="none",
            own_term="raw" if config.own_term else "none",
            smoothing=0.0,
            normalisation="over_time",
            horizon=1,
        )

    @property
    def phase(self) -> str:
        """Always the same."""
        return "proxy"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses and alignment."""
        return frozenset({Statistic.LOSS, Statistic.ALIGNMENT})

    def _parts(self) -> Mapping[str, Part]:
        return {"scores": self._scores}

    def _learn(self, observation: StepObservation) -> None:
        if observation.alignment is None:
            return
        scores = np.clip(self._scores.update(observation), 0.0, MAX_SCORE)
        logits = self._logits + self._config.learning_rate * scores
        self._logits = logits - logits.max()
        weights = np.exp(self._logits)
        self._shares = floored(weights / weights.sum(), self._config.floor)
        self._num_observed += 1
        self._mean = self._mean + (self._shares - self._mean) / self._num_observed

    def _final(self) -> NDArray[np.float64] | None:
        return self._mean if self._num_observed else None
