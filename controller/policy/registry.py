"""From the run file's `policy` to a policy."""

from __future__ import annotations

from controller.policy.acodm.initial import initial_shares
from controller.policy.base import Policy, PolicyContext
from controller.policy.config import (
    AcodmConfig,
    NaturalConfig,
    OdmConfig,
    OdmPaperConfig,
    PolicyConfig,
    RandomActorConfig,
    ScheduleConfig,
    ShuffledRewardConfig,
    StaticConfig,
    UniformConfig,
)
from controller.policy.mixtures import resolve
from controller.policy.odm import OdmPolicy
from controller.policy.planned import PlannedPolicy, first_shares
from controller.policy.settings_of_rivals import AdoConfig, AlignEgConfig, ReplayMeanConfig


def make_policy(config: PolicyConfig, context: PolicyContext) -> Policy:
    """Build the policy that `config` asks for, before its first step.

    Raises:
        UnknownDomain: a mixture names a domain that the run does not have.
        ConfigError: the settings do not fit the run's domains.
    """
    # Imported where they are made: some bring in torch, which takes seconds.
    match config:
        case StaticConfig() | NaturalConfig() | UniformConfig() | ScheduleConfig():
            return PlannedPolicy(config, context)
        case OdmConfig() | OdmPaperConfig():
            return OdmPolicy(config, context)
        case AdoConfig():
            from controller.policy.ado import AdoPolicy

            return AdoPolicy(config, context)
        case AlignEgConfig():
            from controller.policy.align_eg import AlignEgPolicy

            return AlignEgPolicy(config, context)
        case ReplayMeanConfig():
            from controller.policy.replay_mean import ReplayMeanPolicy

            return ReplayMeanPolicy(config, context)
        case RandomActorConfig():
            from controller.policy.random_actor import RandomActorPolicy

            return RandomActorPolicy(config, context)
        case ShuffledRewardConfig():
            from controller.policy.shuffled_reward import ShuffledRewardPolicy

            return ShuffledRewardPolicy(config, context)
        case AcodmConfig():
            from controller.policy.acodm.policy import AcodmPolicy

            return AcodmPolicy(config, context)


def initial_mixture(config: PolicyConfig, context: PolicyContext) -> tuple[float, ...]:
    """Return the [domains] shares of the steps before the policy's first decision.

    A domain that a mixture leaves out gets 0.

    Raises:
        UnknownDomain: a mixture names a domain that the run does not have.
        ConfigError: the settings do not fit the run's domains.
    """
    match config:
        case StaticConfig() | NaturalConfig() | UniformConfig() | ScheduleConfig():
            return first_shares(config, context)
        case OdmConfig() | OdmPaperConfig():
            return resolve(config.initial, context)
        case AdoConfig():
            return resolve(config.prior, context)
        case ReplayMeanConfig():
            from controller.policy.replay_mean import mean_shares

            return mean_shares(config.source, context)
        case AcodmConfig() | AlignEgConfig() | RandomActorConfig():
            return tuple(initial_shares(config, context).tolist())
