"""The mixture before the first decision of AC-ODM and its controls; told without a network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.policy.base import PolicyContext
from controller.policy.config import AcodmConfig, RandomActorConfig
from controller.policy.mixtures import floored, resolve
from controller.policy.settings_of_rivals import AlignEgConfig
from protos.errors import ConfigError


def initial_shares(
    config: AcodmConfig | AlignEgConfig | RandomActorConfig, context: PolicyContext
) -> NDArray[np.float64]:
    """Return the first mixture, above the floor.

    Raises:
        ConfigError: the floor is too high for the number of domains.
    """
    num_domains = len(context.domains)
    if num_domains * config.floor >= 1:
        raise ConfigError(
            f"policy.floor {config.floor:g} for each of {num_domains} domains leaves nothing to "
            f"decide; set it below {1 / num_domains:.4g}"
        )
    return floored(np.asarray(resolve(config.initial, context)), config.floor)
