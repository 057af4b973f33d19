"""From the run file's `policy` to a policy."""

from __future__ import annotations

from controller.policy.acodm.initial import initial_shares
from controller.policy.base import Policy, PolicyContext
from controller.policy.config import (
    AcodmConfig,
    NaturalConfig,
    OdmConfig,
    PolicyConfig,
    ScheduleConfig,
    StaticConfig,
    UniformConfig,
)
from controller.policy.mixtures import resolve
from controller.policy.odm import OdmPolicy
from controller.policy.planned import PlannedPolicy, first_shares


def make_policy(config: PolicyConfig, context: PolicyContext) -> Policy:
    """Build the policy that `config` asks for, before its first step.

    Raises:
        UnknownDomain: a mixture names a domain that the run does not have.
        ConfigError: the settings do not fit the run's domains.
    """
    match config:
        case StaticConfig() | NaturalConfig() | UniformConfig() | ScheduleConfig():
            return PlannedPolicy(config, context)
        case OdmConfig():
            return OdmPolicy(config, context)
        case AcodmConfig():
            # Brings in torch, which takes seconds and which no other policy needs.
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
        case OdmConfig():
            return resolve(config.initial, context)
        case AcodmConfig():
            return tuple(initial_shares(config, context).tolist())
