"""Settings of the policies that AC-ODM is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from controller.policy.settings import (
    MixtureSetting,
    PolicyModel,
    RewardSettings,
    checked_setting,
)


class AdoConfig(PolicyModel):
    """Adaptive data optimisation: by what each domain's scaling law says is left to learn."""

    name: Literal["ado"] = "ado"
    prior: MixtureSetting = "natural"
    """What the shares are weighed by, and the mixture until the first fit."""

    fit_every: int | None = Field(default=None, ge=1)
    """Steps between fits of the laws. Null: a 60th of the run, as published, but at least 20."""

    ignore_steps: int | None = Field(default=None, ge=0)
    """First steps that no law is fitted to. Null: a 60th of the run, as published."""

    smoothing_window: int | None = Field(default=None, ge=5)
    """Steps over which losses are smoothed, an odd number. Null: 101 as published, or the 20th part
    of a run that is shorter than 2,020 steps."""

    credit_exponent: float = Field(default=0.5, ge=0)
    """How much a domain's recent share counts for what it was seen to learn."""

    credit_smoothing: float = Field(default=0.9, ge=0, lt=1)
    average_weight: float = Field(default=0.9, ge=0, lt=1)
    """Part of the shares that comes from their average over time."""

    wanted_floor: float = Field(default=0.01, ge=0)
    """Least share before the average; half of an even share where that is less."""

    _shares = field_validator("prior")(checked_setting)

    @field_validator("smoothing_window")
    @classmethod
    def _is_odd(cls, window: int | None) -> int | None:
        if window is not None and window % 2 == 0:
            raise ValueError(f"smoothing_window must be odd, got {window}")
        return window


class AlignEgConfig(RewardSettings):
    """Exponentiated gradient on AC-ODM's reward: the same signal without reinforcement learning."""

    name: Literal["align_eg"] = "align_eg"
    initial: MixtureSetting = "natural"
    """The mixture to begin with, and the one that `anchor_weight` pulls to."""

    learning_rate: float = Field(default=0.05, gt=0, le=1)
    """eta: what a reward of one standard deviation adds to a domain's log share in a step."""

    anchor_weight: float = Field(default=1.0, ge=0)
    """Pull towards `initial`, as in `acodm`; 0: none, and the best domain ends with everything."""

    _shares = field_validator("initial")(checked_setting)


class ReplayMeanConfig(PolicyModel):
    """A control: the mean mixture of another run, from the first step to the last."""

    # The ledger keeps settings by their fields' names.
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: Literal["replay_mean"] = "replay_mean"
    source: Path = Field(alias="from")
    """A run's folder, its ledger, or a JSON file of shares by domain."""
