"""What a trial leaves behind: one JSON file, from which alone the report is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.whole_file import write_whole
from protos.errors import DataError

RECORD_FILE = "record.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The test loss after so many steps."""

    step: int
    test_loss: list[float]
    """[domains] nats a token"""

    wall_s: float
    """Of training and deciding so far, without evaluations."""

    cpu_s: float
    """Processor time of the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What happened between two evaluations; arrays are in the order of the domains."""

    first_step: int
    num_steps: int
    planned: list[float]
    """[domains] mean share asked for"""

    executed: list[float]
    """[domains] share of the sequences delivered"""

    train_loss: list[float | None]
    """[domains] nats a token; null where nothing of the domain came"""

    reward: list[float | None]
    """[domains] mean of AC-ODM's plain reward (`dot`); null where gradients are not measured"""

    reward_spread: float | None
    """Standard deviation between domains of the rewards' means over the interval's steps."""

    reward_noise: float | None
    """Standard deviation within a domain from step to step, root mean square over domains."""

    diagnostics: dict[str, float]
    """Means over the steps of what the policy told of itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """A finished trial."""

    format: int = FORMAT
    arm: str
    seed: int
    policy: dict[str, Any]
    """Its settings as the spec has them."""

    model: str
    parameters: int
    matrix_parameters: int
    """Weights that are multiplied with for each token: what a token costs goes by these."""

    steps: int
    tokens_a_step: int
    domains: list[str]
    natural: list[float]
    """[domains] share of the training text's bytes"""

    epochs: list[float]
    """[domains] tokens trained on over the tokens of an epoch"""

    evaluations: list[Evaluation]
    intervals: list[Interval]
    max_share_error_sequences: float
    """Greatest difference, over domains and prefixes of the run, of sequences planned and given."""

    held_decisions: int
    guard_changes: dict[str, int]
    """Steps at which a rule of the guard changed the proposal, by rule."""

    decide_ms: dict[str, float]
    """p50 and p99"""

    probe_share: float
    """Of the training time."""

    policy_validations: int = 0
    """Evaluations on the policy-validation split, which cost the arm time."""

    validation_tokens: int = 0
    charged: list[str] = field(default_factory=list)
    """Arms whose trial of this seed had to be run first for the policy (a proxy run)."""

    resumed_at: list[int] = field(default_factory=list)
    """Steps at which an interrupted trial went on."""

    torch_version: str = ""

    def macro(self) -> list[float]:
        """Return the mean over domains of each evaluation's test loss."""
        return [sum(each.test_loss) / len(each.test_loss) for each in self.evaluations]


def write_record(record: TrialRecord, folder: Path) -> None:
    """Write a finished trial's record; a folder that has one holds a finished trial."""
    text = json.dumps(_rounded(asdict(record)), allow_nan=False)
    write_whole(folder / RECORD_FILE, text + "\n")


def read_record(path: Path) -> TrialRecord:
    """Read what `write_record` wrote.

    Raises:
        DataError: the file is not a trial's record.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}, wanted {FORMAT}")
        values["evaluations"] = [Evaluation(**each) for each in values["evaluations"]]
        values["intervals"] = [Interval(**each) for each in values["intervals"]]
        return TrialRecord(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a trial's record: {error}") from error


def read_records(folder: Path) -> list[TrialRecord]:
    """Return the finished trials below `folder/trials`, by arm and seed."""
    return [read_record(path) for path in sorted(folder.glob(f"trials/*/{RECORD_FILE}"))]


def trial_folder(out: Path, arm: str, seed: int) -> Path:
    """Return where a trial's files are."""
    return out / "trials" / f"{arm}.seed{seed}"


def mean_mixture(record: TrialRecord) -> dict[str, float]:
    """Return the mean share that each domain got over a trial."""
    total = sum(interval.num_steps for interval in record.intervals)
    return {
        domain: sum(each.executed[index] * each.num_steps for each in record.intervals) / total
        for index, domain in enumerate(record.domains)
    }


def _rounded(value: Any) -> Any:
    """Return the value with floats of six significant digits: more is noise, and fills disks."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(inner) for inner in value]
    return value
