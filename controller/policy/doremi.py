"""The `doremi` policy: group-robust shares by the excess over a reference model (2305.10429).

The run is DoReMi's proxy run. In each step, for each domain,

    lambda = mean over its tokens of max(loss - reference loss, 0)
    w <- w exp(eta lambda), normalised;  w <- (1 - c) w + c / domains

from w = 1 / domains. Its result is the mean of w over time: the state holds it as `final`, and
`replay_mean` takes it from a snapshot, or the run's executed mean from the run itself, for the run
that the proxy is for. The reference model is a run before this one; the trainer gives its losses of
the same tokens (`session.loss(..., reference=...)`).

Where it differs from the published code, and why:

* Sequences are sampled by w, where the code samples evenly and weighs losses by w: the gradient is
  the same in expectation, and mixtures are what this service carries out.
* A domain that a step does not have keeps its last lambda, as in the code; one that none had yet
  gets the mean of the others, where the code has the logarithm of the vocabulary's size, by which a
  domain would gain from not being sampled.
* w takes effect `control.lag` steps later; the code's, with accumulation, one step later.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, Statistic
from controller.policy.online import OnlinePolicy
from controller.policy.settings_of_rivals import DoremiConfig
from protos.errors import ConfigError


class DoremiPolicy(OnlinePolicy):
    """Multiplies the shares of domains that the model has most to learn of."""

    kept_arrays = ("excess", "mean")
    kept_values = ("num_observed",)

    def __init__(self, config: DoremiConfig, context: PolicyContext) -> None:
        num_domains = len(context.domains)
        super().__init__(config, context, np.full(num_domains, 1 / num_domains))
        self._config = config
        self._excess = np.full(num_domains, np.nan)
        self._mean = np.zeros(num_domains)
        self._num_observed = 0

    @property
    def phase(self) -> str:
        """Always the same."""
        return "proxy"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses, and their excess over a reference's."""
        return frozenset({Statistic.LOSS, Statistic.EXCESS})

    def _learn(self, observation: StepObservation) -> None:
        if observation.excess_sum is None:
            raise ConfigError(
                f"policy {self.name} needs the losses of a reference model, and not every rank has "
                f"given them for step {observation.step}: "
                "session.loss(logits, batch, reference=...)"
            )
        seen = observation.tokens > 0
        excess = observation.excess_sum / np.maximum(observation.tokens, 1)
        excess = np.where(seen, excess, self._excess)
        self._excess = np.where(np.isnan(excess), excess[seen].mean(), excess)
        # The same for all but a factor, which keeps the exponentials in range.
        logits = self._config.learning_rate * (self._excess - self._excess.max())
        weights = self._shares * np.exp(logits)
        even = 1 / self._num_domains
        smoothing = self._config.smoothing
        self._shares = (1 - smoothing) * weights / weights.sum() + smoothing * even
        self._num_observed += 1
        self._mean = self._mean + (self._shares - self._mean) / self._num_observed

    def _final(self) -> NDArray[np.float64] | None:
        return self._mean if self._num_observed else None
