"""What a comparison is: arms, seeds, data, model and budget, the same for all but the policy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from controller.config import BatchSection, ControlSection, ProbeSection
from controller.config_errors import first_sentence
from controller.guard import GuardConfig
from deploy.compare.splits import SplitShares
from deploy.whole_file import write_whole
from protos.errors import ConfigError

SPEC_FILE = "compare.yaml"

Count = Annotated[int, Field(strict=True, ge=1)]
Settings = dict[str, Any]

MEAN_OF = "mean_of"
MEAN_FILE_OF = "mean_file_of"
POLICY_OF = "policy_of"
REFERENCES = (MEAN_OF, MEAN_FILE_OF, POLICY_OF)


class Section(BaseModel):
    """A part of the spec: unknown keys are errors, and nothing changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """What is trained and tested on."""

    source: Path
    """Folder of text, as `headrace pack` takes it."""

    prepared: Path | None = None
    """Where splits, shards, tokenizer and index are made, once; null: in the comparison's folder.
    Comparisons that name the same folder share it."""

    text_field: str = Field(default="text", min_length=1)
    vocab_size: Annotated[int, Field(strict=True, ge=260, le=65_536)] = 2048
    splits: SplitShares = SplitShares()
    test_sequences: Count = 32
    """Of each domain, `batch.sequence_length` tokens each: the same for every trial."""

    validation_sequences: Count = 16
    """Of each domain, for policies that ask for a validation loss."""


class TrainingSection(Section):
    """How the model is trained: the same for every arm.

    The learning rate rises linearly and then stays: if it fell towards the end, a loss in the
    middle of a run could not be compared with another run's last one, and "steps to X" would mean
    nothing.
    """

    model: str = "1m"
    lr: float = Field(default=3e-3, gt=0)
    warmup_steps: Annotated[int, Field(strict=True, ge=0)] = 20
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    micro_batch: Count = 32


class EvaluationSection(Section):
    """When the test loss is measured, and how the curves are read."""

    every: Count = 25
    """Steps; before the first and after the last one it is measured, too."""

    smoothing: Count = 3
    """Evaluations in the trailing mean by which curves are compared and crossings found."""

    confidence: float = Field(default=0.95, gt=0, lt=1)


class Arm(Section):
    """A policy under a label."""

    policy: Settings
    """As in the run file, but that a value may refer to another arm's trial of the same seed:
    `{mean_of: ARM}` is its mean mixture, `{mean_file_of: ARM}` the file of that and
    `{policy_of: ARM}` the file of its final policy."""

    model: str | None = None
    """Null: the comparison's."""

    shown: bool = True
    """False: it only serves other arms, e.g. as the proxy run that they are charged for."""

    @field_validator("policy")
    @classmethod
    def _has_a_name(cls, policy: Settings) -> Settings:
        if not isinstance(policy.get("name"), str):
            raise ValueError(f"a policy needs a name, got {policy}")
        return policy

    def references(self) -> dict[str, set[str]]:
        """Return the arms that `policy` refers to, by the kind of reference."""
        found: dict[str, set[str]] = {kind: set() for kind in REFERENCES}
        for kind, arm in _references(self.policy):
            found[kind].add(arm)
        return found


class CompareSpec(Section):
    """A whole comparison."""

    data: DataSection
    steps: Count
    seeds: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = (0, 1, 2)
    arms: dict[str, Arm] = Field(min_length=1)
    batch: BatchSection
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    guard: GuardConfig = GuardConfig(min_share=0.005)
    control: ControlSection = ControlSection()
    probe: ProbeSection = ProbeSection()

    @field_validator("arms", mode="before")
    @classmethod
    def _policies_may_stand_alone(cls, arms: object) -> object:
        """Take `label: {name: odm}` for `label: {policy: {name: odm}}`."""
        if not isinstance(arms, Mapping):
            return arms
        return {
            label: {"policy": arm} if isinstance(arm, Mapping) and "name" in arm else arm
            for label, arm in arms.items()
        }

    @model_validator(mode="after")
    def _arms_are_there(self) -> CompareSpec:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ from one another, got {list(self.seeds)}")
        for label in self.arms:
            if not label.replace("-", "_").isidentifier():
                raise ValueError(
                    f"an arm's label has letters, digits, - and _ and begins with a letter, got "
                    f"{label!r}"
                )
            self._check_references(label, ())
        return self

    def _check_references(self, label: str, seen: tuple[str, ...]) -> None:
        if label in seen:
            raise ValueError(f"arms refer to one another in a circle: {' -> '.join(seen)}")
        for kind, other in _references(self.arms[label].policy):
            if other not in self.arms:
                raise ValueError(
                    f"arm {label!r} has {kind}: {other}, but the arms are {', '.join(self.arms)}"
                )
            self._check_references(other, (*seen, label))

    def model_of(self, arm: str) -> str:
        """Return the name of the model that an arm trains."""
        return self.arms[arm].model or self.training.model

    def trials(self) -> list[tuple[str, int]]:
        """Return (arm, seed) pairs in the order of running: all arms of a seed before the next.

        So whatever has been finished at any moment is a balanced set. An arm comes after those
        that it refers to.
        """
        ordered: list[str] = []
        for label in self.arms:
            self._put(label, ordered)
        return [(label, seed) for seed in self.seeds for label in ordered]

    def _put(self, label: str, ordered: list[str]) -> None:
        for _, other in _references(self.arms[label].policy):
            self._put(other, ordered)
        if label not in ordered:
            ordered.append(label)


def _references(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        if len(value) == 1:
            ((key, arm),) = value.items()
            if key in REFERENCES and isinstance(arm, str):
                yield key, arm
                return
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _references(inner)


def resolve_references(value: Any, found: Mapping[tuple[str, str], Any]) -> Any:
    """Return `value` with every reference replaced by what `found` has for it."""
    if isinstance(value, Mapping):
        references = list(_references(value))
        if len(value) == 1 and references and next(iter(value)) in REFERENCES:
            return found[references[0]]
        return {key: resolve_references(inner, found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [resolve_references(inner, found) for inner in value]
    return value


def load_spec(path: Path) -> CompareSpec:
    """Read a spec.

    Raises:
        ConfigError: it is missing, is not YAML, or says something impossible.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the comparison {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return parse_spec(document, source=str(path))


def parse_spec(document: object, *, source: str) -> CompareSpec:
    """Check what a spec says; `source` names it in errors.

    Raises:
        ConfigError: it says something impossible.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"{source}: a comparison must be a mapping of keys")
    try:
        return CompareSpec.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_sentence(error, CompareSpec)}") from None


def keep_spec(spec: CompareSpec, out: Path) -> None:
    """Write the spec into the comparison's folder.

    A folder that holds a comparison already may get more arms and seeds; all else must be as it
    was, or its finished trials would say something about another comparison.

    Raises:
        ConfigError: it holds a comparison that differs.
    """
    path = out / SPEC_FILE
    wanted = spec.model_dump(mode="json")
    if path.exists():
        held = load_spec(path).model_dump(mode="json")
        _refuse_changes(held, wanted, path)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(json.loads(json.dumps(wanted)), sort_keys=False))


def _refuse_changes(held: Settings, wanted: Settings, path: Path) -> None:
    for section in sorted(held.keys() | wanted.keys()):
        before, now = held.get(section), wanted.get(section)
        if section == "seeds" or before == now:
            continue
        if section == "arms":
            changed = [
                arm
                for arm in held["arms"]
                if wanted["arms"].get(arm, held["arms"][arm]) != held["arms"][arm]
            ]
            if not changed:
                continue
            arm = changed[0]
            section, before, now = f"arms.{arm}", held["arms"][arm], wanted["arms"][arm]
        raise ConfigError(
            f"{path} has {section} = {json.dumps(before)}, now it is {json.dumps(now)}: a "
            "comparison's settings stay, only arms and seeds may be added; name another --out"
        )
