"""A comparison from its settings to its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from controller.config import RunConfig
from controller.prepare import prepare
from deploy.compare.compose import references_of, run_config, stand_in_policy
from deploy.compare.data import (
    PreparedData,
    prepare_data,
    prepared_folder,
    source_domains,
    tokenize_all,
)
from deploy.compare.figures import draw_figures
from deploy.compare.model import check_model
from deploy.compare.page import PAGE_FILE, write_page
from deploy.compare.record import read_records
from deploy.compare.running import TrialQueue
from deploy.compare.spec import SPEC_FILE, CompareSpec, keep_spec, load_spec, parse_spec
from deploy.compare.summary import RESULTS_FILE, summarise
from deploy.compare.table import print_results
from deploy.progress import Progress
from deploy.runfile import SMALL_ACODM
from deploy.whole_file import write_whole
from protos.errors import ConfigError

DEFAULT_OUT = Path("runs/compare")

_NETWORKS = ("acodm", "shuffled_reward")
"""Policies whose own networks would work longer than a small model."""

_BATCH = {"global_sequences": 24, "sequence_length": 64, "lanes": 8, "window_samples": 64}
_EVALUATIONS = 15


def find_comparison(
    what: Path | None, out: Path | None, chosen: Mapping[str, Any]
) -> tuple[CompareSpec, Path]:
    """Return the comparison that the command line means, and its folder.

    Args:
        what: a YAML file, or the folder of a comparison that has begun; None: see `chosen`.
        out: the folder; None: `what` if that is one, else a default.
        chosen: options that make a comparison if there is no file.

    Raises:
        ConfigError: there is none, or it says something impossible.
    """
    if what is None:
        return _from_options(chosen), (out or DEFAULT_OUT).absolute()
    if chosen["data"] is not None:
        raise ConfigError(f"{what} says what is compared; leave out --data, or leave out {what}")
    if what.is_dir():
        if not (what / SPEC_FILE).is_file():
            raise ConfigError(f"{what} holds no comparison: there is no {SPEC_FILE} in it")
        return load_spec(what / SPEC_FILE), (out or what).absolute()
    return load_spec(what), (out or DEFAULT_OUT).absolute()


def _from_options(chosen: Mapping[str, Any]) -> CompareSpec:
    arms: dict[str, Any] = {}
    for name in chosen["policies"]:
        arms[name] = {"name": name, **(SMALL_ACODM if name in _NETWORKS else {})}
    document = {
        "data": {"source": str(chosen["data"].absolute())},
        "steps": chosen["steps"],
        "seeds": list(range(chosen["seeds"])),
        "arms": arms,
        "batch": _BATCH,
        "training": {"model": chosen["model"], "lr": chosen["lr"]},
        "evaluation": {"every": max(chosen["steps"] // _EVALUATIONS, 1)},
    }
    return parse_spec(document, source="the options")


def run_comparison(
    spec: CompareSpec, out: Path, console: Console, *, jobs: int, only: Sequence[str] = ()
) -> None:
    """Make the data and run the trials that are not finished.

    Raises:
        ConfigError: an arm's settings are impossible, or the folder holds another comparison.
        DataError: the data cannot be used.
        TrainerFailed: a trial failed.
        Stopped: a signal came.
    """
    unknown = [arm for arm in only if arm not in spec.arms]
    if unknown:
        raise ConfigError(f"--only names {unknown[0]!r}; the arms are {', '.join(spec.arms)}")
    for model in {spec.model_of(arm) for arm in spec.arms}:
        check_model(model)
    with Progress(console) as progress:
        queue = TrialQueue(spec, out, progress, only=only)
        if not queue.num_waiting:
            progress.say("all trials are finished")
            return
        # Cheap checks first: a misspelt key must not cost the making of the data.
        _run_configs(spec, PreparedData(prepared_folder(spec, out), source_domains(spec)), out)
        keep_spec(spec, out)
        data = prepare_data(spec, out, progress)
        runs = [
            prepare(config).spec
            for arm, config in _run_configs(spec, data, out).items()
            # What another trial has yet to make cannot be opened now.
            if not references_of(spec, arm)
        ]
        with progress.stage("tokenizing the train split"):
            tokenize_all(data, runs[0])
        queue.run(jobs=jobs)


def _run_configs(spec: CompareSpec, data: PreparedData, out: Path) -> dict[str, RunConfig]:
    """Return every arm's run, with stand-ins for what other trials have yet to make.

    Raises:
        ConfigError: a policy's settings are impossible.
    """
    return {
        arm: run_config(
            spec,
            data,
            out,
            arm=arm,
            seed=spec.seeds[0],
            policy=stand_in_policy(spec, arm, data.domains),
        )
        for arm in spec.arms
    }


def draw_report(spec: CompareSpec, out: Path, console: Console) -> dict[str, Any]:
    """Write results.json, plots and the page from what is finished; print the tables.

    Raises:
        DataError: a record cannot be read.
    """
    results = summarise(spec, read_records(out))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / RESULTS_FILE, json.dumps(results, indent=2, allow_nan=False) + "\n")
    figures = draw_figures(results, out)
    write_page(results, figures, out / PAGE_FILE)
    print_results(results, console)
    console.print(f"{out / PAGE_FILE}", highlight=False, soft_wrap=True)
    return results
