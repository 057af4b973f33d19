"""The `random_actor` policy: a frozen, random actor, which is what the published AC-ODM ships.

A control. In the published code nothing ever steps the actor, so the policy of its main phase is a
network as it was initialised: depth x [Linear, LayerNorm, ReLU] of `width`, Linear, softmax, with
torch's default initialisation. Its input is the published state, too:

* losses, their change, sequences, weight norms and update norms: each vector less its own mean, in
  its own (unbiased) standard deviations, cut off at 3;
* the change of a loss is from the first step, not the one before, since the code never renews what
  it compares with; sequences are those of the step; progress is 100 (step + 1) / steps.

Where it differs from the published code, and why: it acts from the first observation, not after a
warm-up by ODM, so that it is nothing but what it is called; shares get `floor`, as AC-ODM's do
here, in the place of one micro-batch of each domain a step; no noise of at most 0.001 on the
shares, which changes nothing but could make them negative; update norms are those of the step, the
ones that are reported. A domain that a step does not have keeps its last loss, one that none had
yet gets the mean of the others; the published code draws every domain every step.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.initial import initial_shares
from controller.policy.acodm.networks import mlp
from controller.policy.acodm.state import state_size
from controller.policy.base import PolicyContext, Statistic
from controller.policy.config import RandomActorConfig
from controller.policy.mixtures import floored
from controller.policy.online import OnlinePolicy
from protos.errors import ConfigError

LIMIT = 3.0
"""Standard deviations at which an input is cut off."""

PROGRESS_SCALE = 100.0
"""The published `iter_coe`."""


class RandomActorPolicy(OnlinePolicy):
    """Looks at the state and answers at random, always the same to the same state."""

    kept_arrays = ("losses", "first_losses", "norms")

    def __init__(self, config: RandomActorConfig, context: PolicyContext) -> None:
        """Draw the network from the run's seed.

        Raises:
            ConfigError: the floor is too high for the number of domains.
        """
        super().__init__(config, context, initial_shares(config, context))
        self._config = config
        self._actor = mlp(
            state_size(self._num_domains, config.norm_layers),
            self._num_domains,
            config.width,
            config.depth,
            torch.Generator().manual_seed(context.seed),
        ).requires_grad_(False)
        self._losses = np.full(self._num_domains, np.nan)
        self._first_losses = np.full(self._num_domains, np.nan)
        self._norms = np.zeros((2, config.norm_layers))

    @property
    def phase(self) -> str:
        """Always the same."""
        return "random"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses, and norms if the state has places for them."""
        norms = {Statistic.NORMS} if self._config.norm_layers else set()
        return frozenset({Statistic.LOSS, *norms})

    def _learn(self, observation: StepObservation) -> None:
        self._take_norms(observation)
        self._losses = np.where(observation.tokens > 0, observation.loss, self._losses)
        first = np.isnan(self._first_losses)
        self._first_losses = np.where(first, self._losses, self._first_losses)
        state = torch.from_numpy(self._state(observation))
        with torch.no_grad():
            shares = torch.softmax(self._actor(state[None])[0].double(), dim=-1).numpy()
        self._shares = floored(shares, self._config.floor)

    def _take_norms(self, observation: StepObservation) -> None:
        both = (observation.weight_norms, observation.update_norms)
        places, most = self._config.norm_layers, max(map(len, both))
        if most > places:
            raise ConfigError(
                f"trainers report the norms of {most} layers at step {observation.step}, "
                f"and policy.norm_layers is {places}; set it to {most} or more"
            )
        for row, norms in enumerate(both):
            self._norms[row, : len(norms)] = norms

    def _state(self, observation: StepObservation) -> NDArray[np.float32]:
        seen = ~np.isnan(self._losses)
        losses = np.where(seen, self._losses, self._losses[seen].mean())
        change = np.where(seen, self._losses - self._first_losses, 0.0)
        progress = PROGRESS_SCALE * (observation.step + 1) / observation.num_steps
        parts = [losses, change, observation.sequences.astype(np.float64), *self._norms]
        return np.concatenate([*map(across, parts), [progress]]).astype(np.float32)


def across(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values less their mean, in their own standard deviations; 0 if all are alike."""
    if len(values) < 2:
        return np.zeros_like(values)
    deviation: NDArray[np.float64] = (values - values.mean()) / (values.std(ddof=1) + 1e-8)
    return np.clip(deviation, -LIMIT, LIMIT)
