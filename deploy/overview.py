"""`headrace --help`: the commands' first lines, without importing what the commands need."""

from __future__ import annotations

import typer

from deploy.exit_codes import EXIT_CODES_HELP

HELP = (
    "Feeds pretraining jobs with text from many domains, and decides while the model trains "
    f"how much of each it sees. {EXIT_CODES_HELP}"
)

COMMANDS = {
    "run": (
        "Train a small GPT on this machine with everything: Ray, controller, loader workers, "
        "torchrun."
    ),
    "compare": (
        "Hold mixing policies against one another on the same data, model and token budget."
    ),
    "pack": "Pack text into webdataset shards: OUT/domain/domain-000000.tar and so on.",
    "index": (
        "Build the dataset index of a run: every shard read once, its samples counted and hashed."
    ),
    "verify": (
        "Check a finished run: ledger intact, plans obeyed, nothing lost, doubled or changed."
    ),
    "explain": (
        "Explain a decision: what a step showed, what the policy proposed, what the guard changed."
    ),
    "export": "Write a ledger as Parquet: OUT/steps, OUT/observations, OUT/plans and so on.",
    "replay": (
        "Make the batches of any steps again, byte for byte, from the ledger and the dataset index."
    ),
    "report": (
        "Draw a run on one HTML page: mixture, losses, alignment, waits, decisions, events."
    ),
    "controller": (
        "Serve a run's controller in the foreground, outside Ray, until Ctrl-C or SIGTERM."
    ),
    "up": (
        "Serve a run on an existing Ray cluster: a controller and loader workers, as Ray actors."
    ),
    "down": (
        "Take a run off a Ray cluster: drain it, end workers and controller, give back their "
        "places."
    ),
    "logs": "Print what an actor of a run on a Ray cluster has logged since its process began.",
    "status": "Say how a live run stands: steps, policy, mixture, losses, workers, quarantines.",
    "scale": "Have more or fewer loader workers, while the run trains; say what moved.",
    "freeze": "Hold the mixture in force until `headrace resume`.",
    "resume": "Give the decision back to the policy, after `mixture set` or `freeze`.",
    "snapshot": "Save the policy's state on the controller's machine; print the path.",
    "drain": "Tell controller and workers that the run is over: no more decisions.",
    "doctor": (
        "Say what would stop a run on this machine, and the remedy; exit code 2 if something would."
    ),
    "mixture": "The mixture of a live run.",
}
"""Each command's first line; a test holds them against the commands themselves."""


def make_app() -> typer.Typer:
    """Return the command line without its commands."""
    return typer.Typer(
        name="headrace",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


def _nothing() -> None:
    """Stand for a command."""


app = make_app()
for _name, _line in COMMANDS.items():
    app.command(_name, help=_line)(_nothing)
