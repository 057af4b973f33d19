"""`headrace compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deploy.exits import stderr, told
from protos.errors import ConfigError

_WHAT = "A comparison's YAML file, or the folder of one that has begun. None: from the options."
_POLICIES = "Names of policies, with commas; more settings than their names need a YAML file."


@told
def compare(
    what: Annotated[Path | None, typer.Argument(metavar="[SPEC|OUT]", help=_WHAT)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of text, as `headrace pack` takes it.")
    ] = None,
    policies: Annotated[str, typer.Option(help=_POLICIES)] = "natural,uniform,acodm",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each trial.")] = 300,
    model: Annotated[
        str, typer.Option(help="nano, 300k, 1m, 3m, 10m, or a Pythia shape as in `headrace run`.")
    ] = "1m",
    lr: Annotated[float, typer.Option(help="Learning rate, the same for every arm.")] = 1e-3,
    out: Annotated[
        Path | None, typer.Option(help="The comparison's folder. Default: runs/compare.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time, each on one core.")] = 2,
    only: Annotated[
        str | None, typer.Option(help="Run these arms of the comparison alone, with commas.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: draw the report from what is finished.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json on stdout; all else on stderr.")
    ] = False,
) -> None:
    """Hold mixing policies against one another on the same data, model and token budget.

    Every policy and seed is a trial on one core, through the real order, packing, probe, policy and
    guard. Trials of a seed share initial weights, data order, floor and held-out text; splits go by
    document hash. Finished trials are never run again, interrupted ones go on from a checkpoint.

    Ends with tables, plots, results.json and report.html in OUT, and with what can be claimed:
    intervals over seeds that exclude 0, all else is called a tie.
    """
    # Slow to import, and `headrace --help` needs none of it.
    from deploy.compare.app import draw_report, find_comparison, run_comparison
    from deploy.last_resort import stoppable
    from deploy.local_ray import temporary_folder

    chosen: dict[str, Any] = {
        "data": data,
        "policies": [name.strip() for name in policies.split(",") if name.strip()],
        "seeds": seeds,
        "steps": steps,
        "model": model,
        "lr": lr,
    }
    if what is None and data is None:
        raise ConfigError("compare needs a YAML file, a comparison's folder, or --data")
    spec, folder = find_comparison(what, out, chosen)
    console = stderr if as_json else Console()
    with temporary_folder() as folder_of_libraries, stoppable(folder_of_libraries):
        if not report:
            arms = [name.strip() for name in (only or "").split(",") if name.strip()]
            run_comparison(spec, folder, console, jobs=jobs, only=arms)
        results = draw_report(spec, folder, console)
    if as_json:
        print(json.dumps(results, indent=2))
