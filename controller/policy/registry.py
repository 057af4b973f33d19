"""From the run file's `policy` to a policy."""

from __future__ import annotations

import numpy as np

from controller.policy.acodm.initial import initial_shares
from controller.policy.base import Policy, PolicyContext
from controller.policy.config import (
    AcodmConfig,
    NaturalConfig,
    OdmConfig,
    OdmPaperConfig,
    PolicyConfig,
    ProxyConfig,
    RandomActorConfig,
    ScheduleConfig,
    ShuffledRewardConfig,
    StaticConfig,
    UniformConfig,
)
from controller.policy.mixtures import floored, resolve
from controller.policy.odm import OdmPolicy
from controller.policy.planned import PlannedPolicy, first_shares
from controller.policy.settings_of_rivals import (
    AdoConfig,
    AioliConfig,
    AlignEgConfig,
    DogeConfig,
    DoremiConfig,
    PikeConfig,
    ReplayMeanConfig,
    SkillitConfig,
)
from protos.spec import ValidationSpec
from protos.types import Step


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
        case DoremiConfig():
            from controller.policy.doremi import DoremiPolicy

            return DoremiPolicy(config, context)
        case DogeConfig():
            from controller.policy.doge import DogePolicy

            return DogePolicy(config, context)
        case SkillitConfig():
            from controller.policy.skillit import SkillitPolicy

            return SkillitPolicy(config, context)
        case AioliConfig():
            from controller.policy.aioli import AioliPolicy

            return AioliPolicy(config, context)
        case PikeConfig():
            from controller.policy.pike import PikePolicy

            return PikePolicy(config, context)
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
            from controller.policy.acodm.frozen import FrozenAcodmPolicy
            from controller.policy.acodm.policy import AcodmPolicy

            if config.proxy is not None and config.proxy.mode == "frozen":
                return FrozenAcodmPolicy(config, context)
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
        case DoremiConfig() | DogeConfig():
            return resolve("uniform", context)
        case AioliConfig():
            return resolve(config.initial, context)
        case PikeConfig():
            shares = np.asarray(resolve(config.initial, context))
            return tuple(floored(shares, config.floor).tolist())
        case SkillitConfig():
            from controller.policy.skillit import first_shares as skillit_shares

            return skillit_shares(config, context)
        case ReplayMeanConfig():
            from controller.policy.replay_mean import mean_shares

            return mean_shares(config.source, context)
        case AcodmConfig(proxy=ProxyConfig()):
            return tuple(make_policy(config, context).propose(Step(0)))
        case AcodmConfig() | AlignEgConfig() | RandomActorConfig():
            return tuple(initial_shares(config, context).tolist())


def validation_of(config: PolicyConfig, context: PolicyContext) -> tuple[ValidationSpec, ...]:
    """Return when the policy needs the model to be evaluated on held-out documents; empty: never.

    Raises:
        ConfigError: the settings do not fit the run.
    """
    match config:
        case AioliConfig():
            from controller.policy.aioli import timetable

            return (timetable(config, context).validation,)
        case SkillitConfig():
            from controller.policy.skillit import validation_of as validation_of_skillit

            return validation_of_skillit(config, context)
        case _:
            return ()
