"""The `shuffled_reward` policy: AC-ODM whose rewards go to domains at random.

A control. All of it is AC-ODM, except that in each step the vector of rewards is permuted over the
domains, each step by another permutation (drawn from the run's seed and the step alone, so that a
restart draws it again). The size and spread of the rewards stay what they are; what they say about
the domains is gone. What this policy gains over `uniform` or `natural` AC-ODM does not gain by its
reward.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.policy import AcodmPolicy
from controller.policy.base import PolicyContext
from controller.policy.config import ShuffledRewardConfig


class ShuffledRewardPolicy(AcodmPolicy):
    """Learns as AC-ODM does, from rewards that mean nothing."""

    def __init__(self, config: ShuffledRewardConfig, context: PolicyContext) -> None:
        super().__init__(config, context)
        self._seed = context.seed

    def _reward(self, observation: StepObservation) -> NDArray[np.float64]:
        rewards = super()._reward(observation)
        return rewards[permutation(self._seed, observation.step, len(rewards))]


def permutation(seed: int, step: int, num_domains: int) -> NDArray[np.int64]:
    """Return whose reward each of [domains] gets at `step`."""
    return np.random.default_rng((seed, step)).permutation(num_domains)
