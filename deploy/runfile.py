"""The run file of a local run: built-in settings, then a base file, then options, then --set."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from controller.config import load_run_file, parse_run
from deploy.whole_file import write_whole
from protos.errors import ConfigError

RUN_FILE = "run.yaml"
ADDRESS = "controller.address"
"""In the run's folder: where its controller serves, as long as it does."""

Settings = dict[str, Any]
"""What a run file says, as YAML reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What the command line asked for; None: whatever the base file or the built-in says."""

    out: Path
    data: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    policy: str | None = None
    steps: int | None = None
    seed: int | None = None
    sequence_length: int | None = None
    global_sequences: int | None = None
    lanes: int | None = None
    workers: int | None = None
    settings: tuple[str, ...] = ()
    """`dotted.key=value`, the value as in YAML."""

    ranks: int = 2
    model: str | None = None
    """None: `tiny`, or on a resume the one that the run began with."""

    lr: float | None = None
    digest: bool = False
    resume: bool = False
    until: int | None = None
    checkpoint_every: int = 50
    dashboard: str | None = None
    """Where the live page is served; None: as the base file says, else nowhere."""


_BUILT_IN: Settings = {
    "seed": 0,
    "steps": 300,
    # Any free port: two runs on one machine do not meet.
    "address": "127.0.0.1:0",
    "batch": {
        "global_sequences": 16,
        "sequence_length": 128,
        "lanes": 8,
        "window_samples": 64,
        "interleave": 4,
    },
    "policy": {"name": "acodm"},
    "workers": {"count": 2},
}

DEFAULT_MODEL = "tiny"

SMALL_ACODM: Settings = {"width": 128, "depth": 3}
"""With AC-ODM's own 1024 x 5 networks, the policy would work longer than the tiny model."""

_LIKE_ACODM = ("acodm", "random_actor", "shuffled_reward")
"""Policies that have such networks."""


def default_out() -> Path:
    """Return a new folder's name below `runs`."""
    return Path("runs") / time.strftime("local-%Y%m%d-%H%M%S")


def compose(options: RunOptions) -> Settings:
    """Return what the run file will say, but for its `data` where that is still to be made.

    Raises:
        ConfigError: the base file or a `--set` cannot be read.
    """
    settings = copy.deepcopy(_BUILT_IN)
    if options.config is not None:
        _merge(settings, _read_yaml(options.config))
    _apply_options(settings, options)
    for text in options.settings:
        _set(settings, text)
    settings["run"] = settings.get("run", options.out.name)
    settings["out"] = str(options.out.resolve())
    return settings


def _apply_options(settings: Settings, options: RunOptions) -> None:
    for key, value in (
        ("seed", options.seed),
        ("steps", options.steps),
        ("batch.sequence_length", options.sequence_length),
        ("batch.global_sequences", options.global_sequences),
        ("batch.lanes", options.lanes),
        ("workers.count", options.workers),
    ):
        if value is not None:
            _assign(settings, key.split("."), value)
    if options.policy is not None and settings["policy"].get("name") != options.policy:
        settings["policy"] = {"name": options.policy}
    if settings["policy"].get("name") in _LIKE_ACODM and (options.model or DEFAULT_MODEL) == "tiny":
        settings["policy"] = {**SMALL_ACODM, **settings["policy"]}


def _merge(settings: Settings, more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        held = settings.get(key)
        # A policy is told apart by its name: keys of one mean nothing to another.
        if isinstance(held, dict) and isinstance(value, Mapping) and key != "policy":
            _merge(held, value)
        else:
            settings[key] = copy.deepcopy(value)


def _set(settings: Settings, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set wants dotted.key=value, got {text!r}")
    try:
        _assign(settings, key.split("."), yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value") from error


def _assign(settings: Settings, keys: Sequence[str], value: Any) -> None:
    for index, key in enumerate(keys[:-1]):
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {'.'.join(keys)}: {'.'.join(keys[: index + 1])} is a value, not a section"
            )
        settings = inner
    settings[keys[-1]] = value


def _read_yaml(path: Path) -> Settings:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read the run file {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a run file must be a mapping of keys")
    return settings


def check(settings: Settings) -> None:
    """Refuse impossible settings before any work is done, though the data is not there yet.

    Raises:
        ConfigError: the run file that would be written says something impossible.
    """
    stand_in = {
        "index": "index.parquet",
        "tokenizer": "tokenizer.json",
        "domains": {"some": {"shards": ["some.tar"]}},
    }
    data = {**stand_in, **settings.get("data", {})}
    parse_run({**settings, "data": data}, source="the run's settings")


def write_run_file(settings: Settings, out: Path) -> Path:
    """Write `out/run.yaml` and read it back.

    Raises:
        ConfigError: it says something impossible.
    """
    parse_run(settings, source="the run's settings")
    out.mkdir(parents=True, exist_ok=True)
    path = out / RUN_FILE
    write_whole(path, yaml.safe_dump(settings, sort_keys=False))
    load_run_file(path)
    return path
