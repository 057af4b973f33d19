"""The `odm` and `odm_paper` policies: online data mixing, a bandit that goes by domains' losses.

`odm` is the updater that the published results were made with, in spite of the text: sample in
proportion to a smoothed perplexity, with a floor that falls with time. `odm_paper` is the rule of
the text, exponential weights of losses over shares (Exp3). Differences from both: a domain's loss
is its mean over tokens rather than over micro-batches, since micro-batches may mix domains here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.config import OdmConfig, OdmPaperConfig
from controller.policy.finite import teaches
from controller.policy.header import HEADER, check_header, header_of
from controller.policy.mixtures import resolve
from protos.types import Step

MAX_LOSS = 100.0
"""Nats; keeps the exponential finite, far above any loss of a model that is not broken."""

WARMUP_SHARE = 0.02
"""Of the run's steps, where the run file does not say."""


class OdmPolicy:
    """The initial mixture during the warm-up, then the bandit's."""

    def __init__(self, config: OdmConfig | OdmPaperConfig, context: PolicyContext) -> None:
        self._config = config
        self._context = context
        self._num_domains = len(context.domains)
        self._warmup_steps = (
            math.ceil(WARMUP_SHARE * context.num_steps)
            if config.warmup_steps is None
            else config.warmup_steps
        )
        self._rewards = np.zeros(self._num_domains)
        self._shares = np.asarray(resolve(config.initial, context))
        self._epsilon = 1 / self._num_domains
        self._acting = False

    @property
    def name(self) -> str:
        """As in the run file."""
        return self._config.name

    @property
    def phase(self) -> str:
        """`warm-up` while the initial mixture holds."""
        return "acting" if self._acting else "warm-up"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses."""
        return frozenset({Statistic.LOSS})

    def observe(self, observation: StepObservation) -> None:
        """Update the rewards of the domains that the step had, and the shares of all."""
        if observation.step < self._warmup_steps or not teaches(observation):
            return
        epsilon = exploration_floor(observation.step + 1, self._num_domains)
        seen = observation.tokens > 0
        loss = np.minimum(observation.loss[seen], MAX_LOSS)
        keep = self._config.smoothing
        if isinstance(self._config, OdmConfig):
            gain = np.exp(loss)
        else:
            # What was drawn had at least one sequence, so its share was not 0.
            gain = loss / np.maximum(observation.planned[seen], 1 / self._context.global_sequences)
        self._rewards[seen] = keep * self._rewards[seen] + (1 - keep) * gain
        weights = self._weights()
        self._shares = (1 - self._num_domains * epsilon) * weights + epsilon
        self._epsilon = epsilon
        self._acting = True

    def _weights(self) -> NDArray[np.float64]:
        parts = self._rewards
        if isinstance(self._config, OdmPaperConfig):
            logits = self._epsilon * self._rewards
            parts = np.exp(logits - logits.max())
        weights: NDArray[np.float64] = parts / parts.sum()
        return weights

    def propose(self, step: Step) -> Sequence[float]:
        """Return the newest shares."""
        return tuple(self._shares.tolist())

    def state(self) -> PolicyState:
        """Return rewards, shares and the floor of the step before."""
        return PolicyState(
            arrays={"rewards": self._rewards.copy(), "shares": self._shares.copy()},
            values={
                HEADER: header_of(self._config, self._context),
                "epsilon": self._epsilon,
                "acting": self._acting,
            },
        )

    def restore(self, state: PolicyState) -> None:
        """Go on from a state that `state` returned.

        Raises:
            ValueError: the state is of another policy, other domains or other settings.
        """
        check_header(state, self._config, self._context)
        self._rewards = np.array(state.arrays["rewards"], dtype=np.float64)
        self._shares = np.array(state.arrays["shares"], dtype=np.float64)
        self._epsilon = float(state.values["epsilon"])
        self._acting = bool(state.values["acting"])


def exploration_floor(time: int, num_domains: int) -> float:
    """Return the least share of a domain at `time` = 1, 2, ..."""
    return min(1 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * time)))
