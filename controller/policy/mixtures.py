"""From a mixture as the run file has it to shares in the order of the run's domains."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from controller.policy.base import PolicyContext
from controller.policy.settings import MixtureSetting
from protos.errors import ConfigError, UnknownDomain


def resolve(setting: MixtureSetting, context: PolicyContext) -> tuple[float, ...]:
    """Return the [domains] shares that `setting` means; they add up to 1.

    A domain that a mixture leaves out gets 0.

    Raises:
        UnknownDomain: the mixture names a domain that the run does not have.
        ConfigError: `natural` is asked for and the domains' sizes are not known.
    """
    if setting == "uniform":
        return (1 / len(context.domains),) * len(context.domains)
    if setting == "natural":
        return _natural(context)
    assert isinstance(setting, dict)
    for domain in setting:
        if domain not in context.domains:
            raise UnknownDomain(
                f"a mixture of the policy names domain {domain!r}; "
                f"the run has {', '.join(context.domains)}"
            )
    return _scaled([setting.get(domain, 0.0) for domain in context.domains])


def _natural(context: PolicyContext) -> tuple[float, ...]:
    sizes = context.domain_sizes
    if len(sizes) != len(context.domains) or not math.fsum(sizes) > 0:
        raise ConfigError(
            f"a natural mixture needs the size of every domain, got {sizes} "
            f"for {', '.join(context.domains)}; build the dataset index again"
        )
    return _scaled(sizes)


def _scaled(weights: list[float] | tuple[float, ...]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def check_floor(floor: float, num_domains: int) -> None:
    """Refuse a least share that all domains together use up.

    Raises:
        ConfigError: it does.
    """
    if num_domains * floor >= 1:
        raise ConfigError(
            f"policy.floor {floor:g} for each of {num_domains} domains leaves nothing to "
            f"decide; set it below {1 / num_domains:.4g}"
        )


def floored(shares: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """Return the mixture of `shares` with the uniform one that gives every domain `floor`."""
    return (1 - len(shares) * floor) * shares + floor
