"""Figures by which to see whether AC-ODM learns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.policy.acodm.moments import RunningMoments

HORIZON = 100
"""Measured steps over which a reward's mean and variance reach."""


def of_rewards(scores: RunningMoments) -> dict[str, float]:
    """Tell of the domains' scores before they are smoothed.

    `reward_mean` and `reward_variance` are the domains' means, over the last steps that had a
    score; `reward_snr` is how far the domains' mean scores lie apart, in standard deviations of a
    domain's score from step to step.
    """
    noise = float(scores.variance.mean())
    figures = {"reward_mean": float(scores.mean.mean()), "reward_variance": noise}
    if noise > 0:
        figures["reward_snr"] = float(scores.mean.std() / np.sqrt(noise))
    return figures


def of_mixture(shares: NDArray[np.float64], initial: NDArray[np.float64]) -> dict[str, float]:
    """Tell of the mixture chosen: its entropy (nats), and how much of it `initial` gives others."""
    positive = shares[shares > 0]
    return {
        "actor_entropy": float(-(positive * np.log(positive)).sum()),
        "distance_to_initial": float(np.abs(shares - initial).sum() / 2),
    }
