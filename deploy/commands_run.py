"""`headrace run` and `headrace doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from controller.policy.config import POLICY_NAMES
from deploy.exits import stderr, told
from deploy.page import DashboardOption
from deploy.runfile import RunOptions, default_out
from protos.errors import ConfigError

_DATA = "Folder with a folder (or .jsonl, .jsonl.zst) for each domain; see `headrace pack --help`. "
_DATA += "None: a small corpus from the text that this Python installation holds."
_POLICY = f"{', '.join(POLICY_NAMES)}; default acodm. What a policy needs beside its name comes "
_POLICY += "from --config or --set. With the tiny model, acodm and its like get networks "
_POLICY += "of width 128 and depth 3 rather than its own 1024 and 5, which would be slower than "
_POLICY += "the model; --set policy.width=1024 policy.depth=5 gives them back."
_SET = "A key of the run file and a YAML value: batch.window_samples=256. May be repeated."


@told
def run(
    data: Annotated[Path | None, typer.Option(help=_DATA)] = None,
    config: Annotated[
        Path | None, typer.Option(help="Run file to begin from; options below override it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: a new one below runs/.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help=_POLICY)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: 300.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Trainer ranks under torchrun.")] = 2,
    workers: Annotated[int | None, typer.Option(help="Loader workers. Default: 2.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="tiny, 14m, 70m, 160m, 410m or 1b: Pythia-shaped GPTs. Default: tiny."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json. None: a byte-level BPE is trained on the data."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens that a sequence trains on. Default: 128.")
    ] = None,
    global_sequences: Annotated[
        int | None, typer.Option(help="Sequences in a step's global batch. Default: 16.")
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(help="Fixed groups of slots; divide the batch. Default: 8.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order and weights. Default: 0.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate. Default: 3e-3 for tiny, else 1e-3.")
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints; there is one at the end too.")
    ] = 50,
    until: Annotated[
        int | None, typer.Option(min=1, help="Stop when so many steps of the run are done.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, from its checkpoint.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move a run that --out holds aside, to OUT.1 and so on.")
    ] = False,
    digest: Annotated[
        bool, typer.Option("--digest", help="Write digests.jsonl: a line for each step and slot.")
    ] = False,
    dashboard: DashboardOption = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=_SET)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json on stdout; all else on stderr.")
    ] = False,
) -> None:
    """Train a small GPT on this machine with everything: Ray, controller, loader workers, torchrun.

    Shows how it goes, ends with a report on screen, report.json, plots and the ledger in --out.
    Ctrl-C ends it within 5 seconds, and --resume goes on from the last checkpoint.
    """
    # Slow to import, and `headrace --help` needs none of it.
    from deploy.local import run_local
    from deploy.prepare import move_aside

    folder = out or default_out()
    if resume and (fresh or out is None):
        raise ConfigError("--resume needs the --out of the run to go on with, and no --fresh")
    options = RunOptions(
        out=folder,
        data=data,
        config=config,
        tokenizer=tokenizer,
        policy=policy,
        steps=steps,
        seed=seed,
        sequence_length=sequence_length,
        global_sequences=global_sequences,
        lanes=lanes,
        workers=workers,
        settings=tuple(settings or ()),
        ranks=ranks,
        model=model,
        lr=lr,
        digest=digest,
        resume=resume,
        until=until,
        checkpoint_every=checkpoint_every,
        dashboard=dashboard,
    )
    console = stderr if as_json else Console()
    if fresh:
        aside = move_aside(folder)
        if aside is not None:
            console.print(f"the run that {folder} held is now {aside}", highlight=False)
    report = run_local(options, console)
    if as_json:
        print(json.dumps(report, indent=2))


@told
def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(help="A run file: its data, folders, ports and secrets too.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The address that the controller is to serve. Default: the run file's, or "
            "127.0.0.1:7700."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what would stop a run on this machine, and the remedy; exit code 2 if something would."""
    from deploy.doctor import print_findings
    from deploy.doctor_report import examine

    findings = examine(run_file, address)
    if as_json:
        print(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        print_findings(findings, Console())
    if any(finding.stops for finding in findings):
        raise typer.Exit(2)
