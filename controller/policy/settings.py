"""What the settings of the policies are made of."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


def checked_shares(shares: dict[str, float]) -> dict[str, float]:
    """Return shares that are finite and not negative, at least one above 0.

    Raises:
        ValueError: they are not.
    """
    for domain, share in shares.items():
        if not math.isfinite(share) or share < 0:
            raise ValueError(
                f"the share of domain {domain!r} must be finite and not negative, got {share}"
            )
    if not math.fsum(shares.values()) > 0:
        raise ValueError(f"at least one share must be above 0, got {shares}")
    return shares


Shares = Annotated[dict[str, float], Field(min_length=1)]
"""Domain to share; scaled to add up to 1, and a domain that is left out gets 0."""

MixtureSetting = Literal["natural", "uniform"] | Shares
"""`natural` goes by the domains' bytes of text."""


def checked_setting(setting: MixtureSetting) -> MixtureSetting:
    """Check the shares of a mixture that is given by them.

    Raises:
        ValueError: they are no shares.
    """
    return setting if isinstance(setting, str) else checked_shares(setting)


class PolicyModel(BaseModel):
    """Unknown keys are errors, and nothing changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OwnTerm = Literal["none", "raw", "debiased"]


class RewardSettings(PolicyModel):
    """What those who go by AC-ODM's reward have in common, so that nothing else differs."""

    reward: Literal["dot", "cosine", "paper"] = "dot"
    """`dot`: inner products over the mean gradient norm; `paper`: as they are."""

    reward_smoothing: float = Field(default=0.9, ge=0, lt=1)
    """xi: how much of a domain's old reward stays when a new one comes."""

    normalise: Literal["over_time", "across_domains"] = "over_time"
    importance: Literal["none", "paper"] = "none"
    """`paper`: summed rather than mean gradients, divided by the domain's share."""

    own_term: OwnTerm = "none"
    """Whether a domain's product with itself counts, too: then the reward is, to first order, how
    much a step on the domain lowers the sum of all domains' losses. `raw` is as measured, with the
    noise of the domain's own sequences in it, the more the fewer they are; `debiased` has it taken
    out, for which trainers measure the norm of each sequence's gradient as well."""

    moments_horizon: int = Field(default=1000, ge=1)
    """Steps over which the means and variances that normalise state and reward reach."""

    floor: float = Field(default=0.005, ge=0)
    """Least share of a domain that can be given."""
