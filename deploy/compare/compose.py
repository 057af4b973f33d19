"""A trial as a run: the run file's settings that a comparison gives each arm and seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controller.config import RunConfig, parse_run
from deploy.compare.data import PreparedData
from deploy.compare.record import (
    RECORD_FILE,
    mean_mixture,
    read_record,
    trial_folder,
)
from deploy.compare.spec import (
    MEAN_FILE_OF,
    MEAN_OF,
    POLICY_OF,
    CompareSpec,
    Settings,
    resolve_references,
)

POLICY_FILE = "policy.safetensors"
MEAN_FILE = "mean_mixture.json"

_FILES = {MEAN_FILE_OF: MEAN_FILE, POLICY_OF: POLICY_FILE}


def references_of(spec: CompareSpec, arm: str) -> list[str]:
    """Return the arms whose trials of the same seed must be finished before an arm's."""
    return sorted(set().union(*spec.arms[arm].references().values()))


def is_ready(spec: CompareSpec, out: Path, arm: str, seed: int) -> bool:
    """Tell whether all that an arm refers to is finished."""
    return all(is_finished(out, other, seed) for other in references_of(spec, arm))


def is_finished(out: Path, arm: str, seed: int) -> bool:
    """Tell whether a trial has left its record."""
    return (trial_folder(out, arm, seed) / RECORD_FILE).is_file()


def policy_of(spec: CompareSpec, out: Path, arm: str, seed: int) -> Settings:
    """Return an arm's policy settings with its references resolved.

    Raises:
        DataError: a trial that it refers to is not finished.
    """
    found: dict[tuple[str, str], Any] = {}
    by_kind = spec.arms[arm].references()
    for other in by_kind[MEAN_OF]:
        record = read_record(trial_folder(out, other, seed) / RECORD_FILE)
        found[MEAN_OF, other] = mean_mixture(record)
    for kind, name in _FILES.items():
        for other in by_kind[kind]:
            found[kind, other] = str((trial_folder(out, other, seed) / name).absolute())
    policy: Settings = resolve_references(spec.arms[arm].policy, found)
    return policy


def stand_in_policy(spec: CompareSpec, arm: str, domains: tuple[str, ...]) -> Settings:
    """Return an arm's settings with something of the right kind for what is not known yet."""
    by_kind = spec.arms[arm].references()
    found: dict[tuple[str, str], Any] = {
        (MEAN_OF, other): dict.fromkeys(domains, 1 / len(domains)) for other in by_kind[MEAN_OF]
    }
    for kind, name in _FILES.items():
        found |= {(kind, other): name for other in by_kind[kind]}
    policy: Settings = resolve_references(spec.arms[arm].policy, found)
    return policy


def run_config(
    spec: CompareSpec,
    data: PreparedData,
    folder: Path,
    *,
    arm: str,
    seed: int,
    policy: Mapping[str, Any],
) -> RunConfig:
    """Return the run that a trial is: only `run`, `out` and `policy` differ between arms.

    Raises:
        ConfigError: the policy's settings are impossible.
    """
    shared = spec.model_dump(mode="json", include={"batch", "guard", "control", "probe"})
    settings = {
        "run": f"{arm}-seed{seed}",
        "seed": seed,
        "steps": spec.steps,
        "out": str(folder),
        "data": {**data.run_section(), "text_field": spec.data.text_field},
        "policy": dict(policy),
        **shared,
    }
    return parse_run(settings, source=f"arm {arm}")
