"""The policies that are tried in the environments, with networks small enough for one core."""

from __future__ import annotations

from typing import Any

from controller.policy.base import Policy, PolicyContext
from controller.policy.config import (
    AcodmConfig,
    OdmConfig,
    PolicyConfig,
    RandomActorConfig,
    ShuffledRewardConfig,
    UniformConfig,
)
from controller.policy.registry import make_policy
from controller.policy.settings_of_rivals import AdoConfig, AlignEgConfig
from tests.learning.environments import Environment, Outcome

SMALL: dict[str, Any] = {
    "initial": "uniform",
    "width": 32,
    "depth": 2,
    "norm_layers": 1,
    "batch_size": 16,
    "critic_lr": 3e-3,
    "updates_per_step": 2,
}

ACODM = AcodmConfig(**SMALL)
DEBIASED = AcodmConfig(**SMALL, own_term="debiased")
BOLD = AcodmConfig(**SMALL, own_term="debiased", anchor_weight=0.3)
"""With less of a pull back to the initial mixture."""

CONTENDERS: dict[str, PolicyConfig] = {
    "uniform": UniformConfig(),
    "odm": OdmConfig(initial="uniform"),
    "ado": AdoConfig(prior="uniform"),
    "random_actor": RandomActorConfig(initial="uniform", width=32, depth=2, norm_layers=1),
    "shuffled_reward": ShuffledRewardConfig(**SMALL),
    "align_eg": AlignEgConfig(initial="uniform"),
    "align_eg, debiased": AlignEgConfig(initial="uniform", own_term="debiased"),
    "acodm": ACODM,
    "acodm, gamma 0": ACODM.model_copy(update={"gamma": 0.0}),
    "acodm, scalar critic": ACODM.model_copy(update={"critic": "scalar"}),
    "acodm, cosine": ACODM.model_copy(update={"reward": "cosine"}),
    "acodm, own term raw": ACODM.model_copy(update={"own_term": "raw"}),
    "acodm, own term debiased": DEBIASED,
    "acodm, debiased, anchor 0.3": BOLD,
    "acodm, debiased, anchor 0": BOLD.model_copy(update={"anchor_weight": 0.0}),
}


def play(config: PolicyConfig, environment: Environment, seed: int = 0) -> Outcome:
    """Train a run that a policy with these settings steers."""

    def make(context: PolicyContext) -> Policy:
        return make_policy(config, context)

    return environment.play(make, seed)
