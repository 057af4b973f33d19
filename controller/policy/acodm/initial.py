"""The mixture before the first decision of AC-ODM and its controls; told without a network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.policy.base import PolicyContext
from controller.policy.config import AcodmConfig, RandomActorConfig
from controller.policy.mixtures import check_floor, floored, resolve
from controller.policy.settings_of_rivals import AlignEgConfig


def initial_shares(
    config: AcodmConfig | AlignEgConfig | RandomActorConfig, context: PolicyContext
) -> NDArray[np.float64]:
    """Return the first mixture, above the floor.

    Raises:
        ConfigError: the floor is too high for the number of domains.
    """
    check_floor(config.floor, len(context.domains))
    return floored(np.asarray(resolve(config.initial, context)), config.floor)
