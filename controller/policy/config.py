"""The `policy` part of the run file: one model a policy, told apart by `name`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from controller.policy.settings import (
    MixtureSetting,
    PolicyModel,
    RewardSettings,
    Shares,
    checked_setting,
    checked_shares,
)
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


class StaticConfig(PolicyModel):
    """The same mixture at every step."""

    name: Literal["static"] = "static"
    mixture: Shares

    _shares = field_validator("mixture")(checked_shares)


class NaturalConfig(PolicyModel):
    """Each domain by its size."""

    name: Literal["natural"] = "natural"


class UniformConfig(PolicyModel):
    """Every domain alike."""

    name: Literal["uniform"] = "uniform"


class SchedulePoint(PolicyModel):
    """A mixture and the first step that has it."""

    step: int = Field(ge=0)
    mixture: MixtureSetting

    _shares = field_validator("mixture")(checked_setting)


class ScheduleConfig(PolicyModel):
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


class OdmSettings(PolicyModel):
    """Online data mixing: a bandit that goes by the domains' losses."""

    initial: MixtureSetting = "natural"
    """The mixture of the warm-up."""

    smoothing: float = Field(default=0.5, ge=0, lt=1)
    """How much of a domain's old reward stays when a new one comes."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Null: 2% of the run's steps."""

    _shares = field_validator("initial")(checked_setting)


class OdmConfig(OdmSettings):
    """As the published code has it: in proportion to the smoothed perplexity."""

    name: Literal["odm"] = "odm"


class OdmPaperConfig(OdmSettings):
    """As the published text has it: exponential weights of losses over shares (Exp3)."""

    name: Literal["odm_paper"] = "odm_paper"


class ProxyConfig(PolicyModel):
    """A policy that another run, of a smaller model, has learned."""

    artefact: Path
    """A snapshot of the policy of that run; its settings hold where the run file says nothing."""

    mode: Literal["frozen", "learning"] = "frozen"
    """`frozen`: no gradients are measured; `learning`: it acts from the first step and goes on to
    learn after `warmup_steps`."""

    domains: dict[str, str] | None = None
    """This run's domain: the artefact's name of it. Domains left out keep their names."""


class AcodmConfig(RewardSettings):
    """AC-ODM: an actor-critic rewarded by how well the domains' gradients align."""

    name: Literal["acodm"] = "acodm"
    proxy: ProxyConfig | None = None
    """Null: everything is learned in this run."""

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
    gamma: float = Field(default=0.5, ge=0, lt=1)
    """How much the next step's value counts in a step's; the published code has 0.95. Rewards
    hardly depend on what was mixed before, and a critic that adds 20 of them up learns late."""

    tau: float | None = Field(default=None, gt=0, le=1)
    """How far the target networks move towards the learned ones in an update. Null: as far in a run
    as in the published one, 42 / steps, within 0.001 and 0.05."""

    actor_lr: float | None = Field(default=None, gt=0)
    """Null: 1e-4 x 1024 / width, at most 3e-3. Adam moves a logit by about width x rate an update,
    so narrow networks learn as fast as the published ones."""

    critic_lr: float = Field(default=1e-3, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    anchor_weight: float = Field(default=1.0, ge=0)
    """Pull towards `initial`: a domain whose reward is this many standard deviations above
    another's gets e times the share that `initial` would give it; 0, as published, gives the best
    domain all that the floors leave."""

    replay_capacity: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    updates_per_step: int = Field(default=1, ge=1)
    """How often actor and critic are stepped when they are."""

    update_every: int = Field(default=1, ge=1)
    """Observations from one time of learning to the next: divides what learning costs."""

    # Acting.
    warmup_steps: int | None = Field(default=None, ge=1)
    """Null: 2% of the run's steps, but at least `batch_size`."""

    warmup_acting: Literal["initial", "odm"] = "initial"
    warmup_noise: float = Field(default=0.02, ge=0)
    """Standard deviation of what is added to the shares in the warm-up (`initial` only)."""

    exploration_noise: float = Field(default=0.1, ge=0)
    """Standard deviation of what is added to the actor's logits after it."""

    exploration_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which that noise falls to 0."""

    _shares = field_validator("initial")(checked_setting)

    @model_validator(mode="after")
    def _warmup_varies(self) -> AcodmConfig:
        if self.warmup_acting == "odm" and "warmup_noise" in self.model_fields_set:
            raise ValueError(
                "warmup_noise has no effect with warmup_acting odm; leave one of the two out"
            )
        return self


class ShuffledRewardConfig(AcodmConfig):
    """A control: AC-ODM whose rewards go to domains at random."""

    name: Literal["shuffled_reward"] = "shuffled_reward"  # type: ignore[assignment]  # a tag


class RandomActorConfig(PolicyModel):
    """A control: an actor that is never trained, as the published code ships it."""

    name: Literal["random_actor"] = "random_actor"
    initial: MixtureSetting = "natural"
    """The mixture until the first observation has come."""

    width: int = Field(default=1024, ge=1)
    depth: int = Field(default=5, ge=1)
    norm_layers: int = Field(default=9, ge=0)
    """Places for weight norms in the state, as in `acodm`."""

    floor: float = Field(default=0.005, ge=0)
    """Least share of a domain, as in `acodm`."""

    _shares = field_validator("initial")(checked_setting)


PolicyConfig = Annotated[
    StaticConfig
    | NaturalConfig
    | UniformConfig
    | ScheduleConfig
    | OdmConfig
    | OdmPaperConfig
    | AdoConfig
    | DoremiConfig
    | DogeConfig
    | SkillitConfig
    | AioliConfig
    | PikeConfig
    | AlignEgConfig
    | AcodmConfig
    | RandomActorConfig
    | ShuffledRewardConfig
    | ReplayMeanConfig,
    Field(discriminator="name"),
]
"""What the run file may say under `policy`."""

POLICY_NAMES: tuple[str, ...] = tuple(
    get_args(model.model_fields["name"].annotation)[0]
    for model in get_args(get_args(PolicyConfig)[0])
)
"""As under `policy.name`."""
