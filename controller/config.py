"""The run file: the one place where a run is described, and the controller its one reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from controller.config_cluster import ClusterSection, WorkersSection
from controller.config_dashboard import DashboardSection
from controller.config_errors import first_sentence
from controller.config_metrics import MetricsSection, check_scraping
from controller.config_section import Address, Section
from controller.config_security import SecuritySection
from controller.guard import GuardConfig
from controller.policy.base import Statistic
from controller.policy.config import PolicyConfig, ScheduleConfig
from protos.apportion import MAX_GLOBAL_SEQUENCES
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, DomainEmpty, IndexMismatch
from protos.security import Security, check_bind
from protos.spec import NORMS_ONLY, STOP, ProbeSpec, RunSpec, ValidationSpec
from protos.tokenizer import TokenizerInfo

Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class DomainSection(Section):
    """Where a domain's documents are."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Paths or glob patterns of webdataset shards."""


class DataSection(Section):
    """What is read."""

    index: Path
    tokenizer: Path | None = None
    """None: every shard holds token ids; then `vocab_size` and `eot_id` are required."""

    eot_token: str = "<|endoftext|>"
    vocab_size: Count | None = None
    eot_id: Whole | None = None
    text_field: str = Field(default="text", min_length=1)
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the samples that may be unreadable before the run refuses to go on."""

    on_damage: Literal["skip_sample", "quarantine_shard", "stop"] = "skip_sample"
    """What is done about a sample that cannot be read."""

    domains: dict[str, DomainSection] = Field(min_length=1)

    @property
    def samples_folder(self) -> Path:
        """Where the maps of the shards' samples are: beside the index."""
        return self.index.with_suffix(".samples").absolute()

    @model_validator(mode="after")
    def _tokens_are_known(self) -> DataSection:
        if self.tokenizer is None and (self.vocab_size is None or self.eot_id is None):
            raise ValueError("without data.tokenizer, data.vocab_size and data.eot_id must be set")
        if self.vocab_size is not None and (self.eot_id or 0) >= self.vocab_size:
            raise ValueError(
                f"eot_id must be below vocab_size = {self.vocab_size}, got {self.eot_id}"
            )
        return self


class BatchSection(Section):
    """The shape of a global batch, and how its data is shuffled."""

    global_sequences: Annotated[int, Field(strict=True, ge=1, le=MAX_GLOBAL_SEQUENCES)]
    sequence_length: Count
    lanes: Count = 8
    window_samples: Count = 4096
    interleave: Count = 4
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Whether documents are joined and cut, or laid into sequences undivided where they fit."""

    @model_validator(mode="after")
    def _parts_are_equal(self) -> BatchSection:
        if self.global_sequences % self.lanes:
            raise ValueError(
                f"global_sequences must be a multiple of lanes = {self.lanes}, "
                f"got {self.global_sequences}"
            )
        if self.window_samples % self.interleave:
            raise ValueError(
                f"window_samples must be a multiple of interleave = {self.interleave}, "
                f"got {self.window_samples}"
            )
        return self


class ControlSection(Section):
    """How far ahead the controller decides, and for how long it waits for others."""

    lag: Count = 2
    """A report of step s decides the plan of step s + lag. Where the policy learns nothing, as many
    steps are sealed ahead as last for 50 ms, if those are more."""

    report_grace_s: Seconds = 10.0
    """How long a decision waits for reports that others have sent."""

    degraded_after_s: Seconds = 10.0
    """How long a worker waits for a silent controller before it goes on with the last plan."""

    data_timeout_s: Seconds = 90.0
    worker_timeout_s: Seconds = 10.0
    """A worker that has been silent for so long is lost."""

    snapshot_every: Count = 100
    """Steps between snapshots of the policy."""


class LedgerSection(Section):
    """How much is written down."""

    keep_steps: Count | None = None
    """Reports and observations of so many steps are kept, those of older ones dropped; plans and
    all else that makes the batches are kept for ever. At least as many as the oldest checkpoint
    that a run may go back to lies behind. None: all are kept."""


class ProbeSection(Section):
    """How trainers measure gradients, where the policy needs them."""

    mode: Literal["sketch", "exact"] = "sketch"
    sketch_rows: Count = 64
    sketch_columns: Count = 64
    projection: Literal["sign", "gaussian", "orthonormal"] = "sign"
    draw: Literal["step", "run"] = "step"
    every_n_steps: Count = 1
    num_layers: Count = 3
    layers: tuple[str, ...] = ()


DEFAULT_ADDRESS = "127.0.0.1:7700"


class RunConfig(Section):
    """A whole run file."""

    run: str = Field(min_length=1, max_length=200)
    seed: Whole = 0
    steps: Count
    out: Path
    address: Address = DEFAULT_ADDRESS
    """`host:port`; port 0 takes any free one."""

    data: DataSection
    batch: BatchSection
    policy: PolicyConfig
    shadows: tuple[PolicyConfig, ...] = ()
    """Policies that see what the policy sees and propose without acting, for comparison."""

    guard: GuardConfig = GuardConfig()
    control: ControlSection = ControlSection()
    ledger: LedgerSection = LedgerSection()
    probe: ProbeSection = ProbeSection()
    workers: WorkersSection = WorkersSection()
    cluster: ClusterSection = ClusterSection()
    security: SecuritySection = SecuritySection()
    metrics: MetricsSection = MetricsSection()
    dashboard: DashboardSection | None = None
    """The live page; None: there is none."""

    @model_validator(mode="after")
    def _is_guarded(self) -> RunConfig:
        try:
            check_bind(self.address, self.wire_security)
            check_scraping(self.metrics, self.wire_security)
            if self.dashboard is not None:
                check_bind(self.dashboard.address, self.wire_security)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _schedule_is_in_time(self) -> RunConfig:
        lag = self.control.lag
        if isinstance(self.policy, ScheduleConfig):
            for point in self.policy.points:
                if 0 < point.step < lag:
                    raise ValueError(
                        f"a schedule's points after step 0 must be at control.lag = {lag} or later "
                        f"(the steps before are sealed when the run begins), got {point.step}"
                    )
        return self

    @property
    def wire_security(self) -> Security:
        """The `security` section as both ends of a connection take it."""
        return self.security.on_the_wire()

    @property
    def bad_limit(self) -> float:
        """The share of samples that may be unreadable."""
        return 0.0 if self.data.on_damage == STOP else self.data.max_bad_share

    @property
    def ledger_path(self) -> Path:
        """Where the run's ledger lies."""
        return self.out / "ledger.sqlite"

    @property
    def origin(self) -> dict[str, Any]:
        """What a snapshot of the policy says of the run: whence it comes, and what bound it."""
        return {
            "run": self.run,
            "planned_steps": self.steps,
            "lag": self.control.lag,
            "guard": self.guard.model_dump(mode="json"),
        }

    @property
    def snapshots_path(self) -> Path:
        """The folder of the policy's snapshots."""
        return self.out / "policy"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice, the second time on line {line}"
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_run_file(path: Path) -> RunConfig:
    """Read a run file.

    Raises:
        ConfigError: it is missing, is not YAML, or says something impossible.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the run file {path}: {reason}") from error
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" on line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML: {error.problem}{place}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return parse_run(document, source=str(path))


def parse_run(document: object, *, source: str) -> RunConfig:
    """Check what a run file says; `source` names it in errors.

    Raises:
        ConfigError: it says something impossible.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"{source}: a run file must be a mapping of keys, got {type(document).__name__}"
        )
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_sentence(error, RunConfig)}") from None


def with_metrics(config: RunConfig, address: str | None) -> RunConfig:
    """Return a run whose figures are served at `address`; None: as its run file says.

    Raises:
        ConfigError: they must not be served there.
    """
    if address is None:
        return config
    document = config.model_dump(mode="json")
    document["metrics"]["address"] = address
    return parse_run(document, source="--metrics")


def run_spec(
    config: RunConfig,
    index: DatasetIndex,
    tokenizer: TokenizerInfo | None,
    needs: frozenset[Statistic],
    validation: tuple[ValidationSpec, ...] = (),
) -> RunSpec:
    """Return what all processes of the run must agree on.

    Raises:
        IndexMismatch: the index has other domains than the run.
        DomainEmpty: a domain has too few samples to give each lane one.
        ConfigError: the tokenizer and the run file differ.
    """
    _check_index(config, index)
    vocab_size, eot_id = _token_ids(config, tokenizer)
    probe = None
    if needs & {Statistic.ALIGNMENT, Statistic.NORMS, Statistic.GRADIENT_NOISE}:
        probe = ProbeSpec(
            seed=config.seed,
            part_norms=Statistic.GRADIENT_NOISE in needs,
            **config.probe.model_dump(),
        )
    if probe is not None and not needs & {Statistic.ALIGNMENT, Statistic.GRADIENT_NOISE}:
        probe = dataclasses.replace(probe, mode=NORMS_ONLY)
    return RunSpec(
        run_id=config.run,
        seed=config.seed,
        domains=tuple(config.data.domains),
        num_steps=config.steps,
        lag=config.control.lag,
        vocab_size=vocab_size,
        eot_id=eot_id,
        text_field=config.data.text_field,
        on_damage=config.data.on_damage,
        samples_folder=str(config.data.samples_folder),
        index_sha256=index.sha256,
        data_sha256=index.data_sha256,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else "",
        degraded_after_s=config.control.degraded_after_s,
        data_timeout_s=config.control.data_timeout_s,
        probe=probe,
        validation=validation,
        needs_reference=Statistic.EXCESS in needs,
        **config.batch.model_dump(),
    )


def _check_index(config: RunConfig, index: DatasetIndex) -> None:
    wanted = tuple(config.data.domains)
    remedy = "build it again with `headrace index`"
    if index.domains != wanted:
        raise IndexMismatch(
            f"{config.data.index} has the domains {', '.join(index.domains) or 'none'}, the run "
            f"{', '.join(wanted)}, in this order; {remedy}"
        )
    for domain in wanted:
        num_samples = index.num_samples(domain)
        if num_samples < config.batch.lanes:
            raise DomainEmpty(
                f"domain {domain!r} has {num_samples} samples in {config.data.index}, but each of "
                f"the {config.batch.lanes} lanes needs at least one: add shards to "
                f"data.domains.{domain}.shards, or lower batch.lanes"
            )


def _token_ids(config: RunConfig, tokenizer: TokenizerInfo | None) -> tuple[int, int]:
    data = config.data
    if tokenizer is None:
        if data.vocab_size is None or data.eot_id is None:
            raise ConfigError("without data.tokenizer, data.vocab_size and data.eot_id must be set")
        return data.vocab_size, data.eot_id
    for key, given, found in (
        ("vocab_size", data.vocab_size, tokenizer.vocab_size),
        ("eot_id", data.eot_id, tokenizer.eot_id),
    ):
        # A vocabulary may be padded to a rounder size than the tokenizer's.
        padded = key == "vocab_size" and given is not None and given > found
        if given is not None and given != found and not padded:
            raise ConfigError(
                f"data.{key} is {given}, but {data.tokenizer} says {found}; leave data.{key} out"
            )
    return data.vocab_size or tokenizer.vocab_size, tokenizer.eot_id
