"""The `policy` part of the run file: one model a policy, told apart by `name`."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def _checked_shares(shares: dict[str, float]) -> dict[str, float]:
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


def _checked_setting(setting: MixtureSetting) -> MixtureSetting:
    return setting if isinstance(setting, str) else _checked_shares(setting)


class _PolicyModel(BaseModel):
    """Unknown keys are errors, and nothing changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StaticConfig(_PolicyModel):
    """The same mixture at every step."""

    name: Literal["static"] = "static"
    mixture: Shares

    _shares = field_validator("mixture")(_checked_shares)


class NaturalConfig(_PolicyModel):
    """Each domain by its size."""

    name: Literal["natural"] = "natural"


class UniformConfig(_PolicyModel):
    """Every domain alike."""

    name: Literal["uniform"] = "uniform"


class SchedulePoint(_PolicyModel):
    """A mixture and the first step that has it."""

    step: int = Field(ge=0)
    mixture: MixtureSetting

    _shares = field_validator("mixture")(_checked_setting)


class ScheduleConfig(_PolicyModel):
    """Mixtures that hold from given steps on."""

    name: Literal["schedule"] = "schedule"
    points: tuple[SchedulePoint, ...] = Field(min_length=1)

    @field_validator("points")
    @classmethod
    def _in_order(cls, points: tuple[SchedulePoint, ...]) -> tuple[SchedulePoint, ...]:
        steps = [point.step for point in points]
        if steps[0] != 0:
            raise ValueError(f"the first of points must have step 0, got step {steps[0]}")
        if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"the steps of points must grow, got {steps}")
        return points


class OdmConfig(_PolicyModel):
    """Online data mixing: a bandit that goes by the domains' losses."""

    name: Literal["odm"] = "odm"
    initial: MixtureSetting = "natural"
    """The mixture of the warm-up."""

    form: Literal["smoothed_mean", "exp3"] = "smoothed_mean"
    """`smoothed_mean` is the published code's, `exp3` the published text's."""

    smoothing: float = Field(default=0.5, ge=0, lt=1)
    """How much of a domain's old reward stays when a new one comes."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Null: 2% of the run's steps."""

    _shares = field_validator("initial")(_checked_setting)


class AcodmConfig(_PolicyModel):
    """AC-ODM: an actor-critic rewarded by how well the domains' gradients align."""

    name: Literal["acodm"] = "acodm"
    initial: MixtureSetting = "natural"
    """The mixture around which the warm-up acts."""

    # Networks.
    width: int = Field(default=1024, ge=1)
    depth: int = Field(default=5, ge=1)
    critic: Literal["vector", "scalar"] = "vector"
    """`vector`: a value for each domain, weighted by the mixture; `scalar`: one for the mixture,
    which is exact but learns from how mixtures vary alone, and so slowly."""

    norm_layers: int = Field(default=9, ge=0)
    """Places for weight norms in the state: fewer are padded with 0, more are refused."""

    # Learning.
    gamma: float = Field(default=0.95, ge=0, lt=1)
    tau: float | None = Field(default=None, gt=0, le=1)
    """How far the target networks move towards the learned ones in an update. Null: as far in a run
    as in the published one, 42 / steps, within 0.001 and 0.05."""

    actor_lr: float = Field(default=1e-4, gt=0)
    critic_lr: float = Field(default=1e-3, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    anchor_weight: float = Field(default=1.0, ge=0)
    """Pull towards `initial`: a domain whose reward is this many standard deviations above
    another's gets e times the share that `initial` would give it; 0, as published, gives the best
    domain all that the floors leave."""

    replay_capacity: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    updates_per_step: int = Field(default=1, ge=1)

    # Reward.
    reward: Literal["dot", "cosine", "paper"] = "dot"
    """`dot`: inner products over the mean gradient norm; `paper`: as they are."""

    reward_smoothing: float = Field(default=0.9, ge=0, lt=1)
    """xi: how much of a domain's old reward stays when a new one comes."""

    normalise: Literal["over_time", "across_domains"] = "over_time"
    importance: Literal["none", "paper"] = "none"
    """`paper`: summed rather than mean gradients, divided by the domain's share."""

    own_term: bool = False
    """Count a domain's product with itself, too: then the reward is, to first order, how much a
    step on the domain lowers the sum of all domains' losses."""

    moments_horizon: int = Field(default=1000, ge=1)
    """Steps over which the means and variances that normalise state and reward reach."""

    # Acting.
    floor: float = Field(default=0.005, ge=0)
    """Least share of a domain that the actor can give."""

    warmup_steps: int | None = Field(default=None, ge=1)
    """Null: 2% of the run's steps, but at least `batch_size`."""

    warmup_acting: Literal["initial", "odm"] = "initial"
    warmup_noise: float = Field(default=0.02, ge=0)
    """Standard deviation of what is added to the shares in the warm-up (`initial` only)."""

    exploration_noise: float = Field(default=0.1, ge=0)
    """Standard deviation of what is added to the actor's logits after it."""

    exploration_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which that noise falls to 0."""

    _shares = field_validator("initial")(_checked_setting)

    @model_validator(mode="after")
    def _warmup_varies(self) -> AcodmConfig:
        if self.warmup_acting == "odm" and "warmup_noise" in self.model_fields_set:
            raise ValueError(
                "warmup_noise has no effect with warmup_acting odm; leave one of the two out"
            )
        return self


PolicyConfig = Annotated[
    StaticConfig | NaturalConfig | UniformConfig | ScheduleConfig | OdmConfig | AcodmConfig,
    Field(discriminator="name"),
]
"""What the run file may say under `policy`."""
