"""Settings of the policies that AC-ODM is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

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


class DoremiConfig(PolicyModel):
    """DoReMi's proxy run: by the excess of a domain's loss over a reference model's."""

    name: Literal["doremi"] = "doremi"
    learning_rate: float = Field(default=1.0, gt=0)
    """eta: what an excess of one nat a token adds to a domain's log share in a step."""

    smoothing: float = Field(default=1e-3, gt=0, le=1)
    """c: part of the shares that is spread evenly."""


class DogeConfig(PolicyModel):
    """DoGE's proxy run: by how well a domain's gradient serves all domains."""

    name: Literal["doge"] = "doge"
    learning_rate: float = Field(default=0.05, gt=0)
    """eta, the published lr / mu: what a score of one adds to a domain's log share in a step."""

    own_term: bool = True
    """Count a domain's product with itself, as the published code does; its text does not."""

    floor: float = Field(default=0.005, ge=0)
    """Least share of a domain."""


class PikeConfig(PolicyModel):
    """PiKE: by the size of a domain's gradient against its noise."""

    name: Literal["pike"] = "pike"
    initial: MixtureSetting = "uniform"
    update_steps: int = Field(default=20, ge=1)
    """Steps between updates, over which gradients' moments are averaged."""

    zeta1: float = Field(default=0.1, ge=0)
    """What a squared gradient norm as large as the domains' mean adds to a log share."""

    zeta2: float = Field(default=0.1, ge=0)
    """What twice as much variance of a whole batch's gradient takes from it."""

    floor: float = Field(default=0.005, ge=0)
    """Least share of a domain."""

    _shares = field_validator("initial")(checked_setting)


class AioliConfig(PolicyModel):
    """Aioli: by a mixing law that trial mixtures measure again in every round."""

    name: Literal["aioli"] = "aioli"
    initial: MixtureSetting = "uniform"
    """The mixture between trials until the first law is known."""

    update_steps: int | None = Field(default=None, ge=1)
    """Steps of a round. Null: twice what its trials take, but at least 200 as published."""

    trial_steps: int = Field(default=10, ge=1)
    trial_rounds: int = Field(default=2, ge=1)
    """How often each domain is tried in a round."""

    focus: float = Field(default=0.75, gt=0, le=1)
    """Share of a trial's own domain."""

    learning_rate: float = Field(default=1.0, gt=0)
    law_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """How much of the laws before stays when a new one comes."""

    _shares = field_validator("initial")(checked_setting)


class SkillitConfig(PolicyModel):
    """Skill-It: by which domain helps which, and how much there is to help."""

    name: Literal["skillit"] = "skillit"
    learning_rate: float = Field(default=0.2, gt=0)
    update_steps: int | None = Field(default=None, ge=1)
    """Steps between updates. Null: a 100th of the run, as published."""

    graph: Path | None = None
    """A JSON file that gives for each domain by what part training on it lowers each domain's loss.
    Null: the run begins by learning that."""

    graph_steps: int | None = Field(default=None, ge=1)
    """Steps on each domain alone by which the graph is learned. Null: such that this takes a
    quarter of the run."""

    @model_validator(mode="after")
    def _learns_or_reads(self) -> SkillitConfig:
        if self.graph is not None and self.graph_steps is not None:
            raise ValueError("graph_steps has no effect where graph is given; leave one out")
        return self
