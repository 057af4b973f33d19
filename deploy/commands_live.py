"""The commands that serve, look at and steer a live run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from controller.config import DEFAULT_ADDRESS, load_run_file, with_metrics
from deploy.exits import told
from deploy.on_run import on_run
from deploy.page import DashboardOption, with_page
from deploy.screen import printable, status_panel
from deploy.status_json import status_json
from protos.client import AdminClient
from protos.errors import ConfigError

_TIMEOUT_S = 5.0
_WORK_TIMEOUT_S = 60.0
"""For what has the controller save the policy's state, or close all steps that are reported."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]

mixture = typer.Typer(help="The mixture of a live run.", no_args_is_help=True)


@told
@on_run(default=DEFAULT_ADDRESS)
def status(
    admin: AdminClient,
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until Ctrl-C or the end of the run.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Say how a live run stands: steps, policy, mixture, losses, workers, quarantines.

    With --watch a terminal shows it anew each second; elsewhere there is a plain line for each
    look, or with --json an object.
    """
    if watch:
        from deploy.watching import watch_run

        watch_run(admin, Console(), interval_s=interval, as_json=as_json)
        return
    found = admin.status(timeout_s=_TIMEOUT_S)
    if as_json:
        print(json.dumps(status_json(found), indent=2))
        return
    console = Console()
    console.print(status_panel(found, width=console.width))
    for quarantine in found.quarantines:
        sample = f" sample {quarantine.sample}" if quarantine.sample >= 0 else ""
        line = f"{quarantine.shard}{sample} ({quarantine.domain}): {quarantine.reason}"
        console.print(f"quarantined: {printable(line)}", markup=False, soft_wrap=True)


@mixture.command("set")
@told
@on_run()
def set_mixture(
    admin: AdminClient,
    shares: Annotated[
        list[str], typer.Argument(help="DOMAIN=SHARE ..., scaled to 1; the others get 0.")
    ],
) -> None:
    """Override the policy until `headrace resume`; say which step obeys first."""
    wanted = dict(map(_share, shares))
    first_step = admin.set_mixture(wanted, timeout_s=_TIMEOUT_S)
    print(f"holds from step {first_step} on")


def _share(text: str) -> tuple[str, float]:
    domain, equals, share = text.rpartition("=")
    try:
        if not equals or not domain:
            raise ValueError
        return domain, float(share)
    except ValueError:
        raise ConfigError(f"a share is DOMAIN=NUMBER, got {text!r}") from None


@told
@on_run(default=DEFAULT_ADDRESS, num_before=1)
def scale(
    admin: AdminClient,
    workers: Annotated[int, typer.Argument(min=1, help="How many loader workers there shall be.")],
    *,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait until it has happened.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Have more or fewer loader workers, while the run trains; say what moved.

    Workers that are to go serve until others have their lanes. The wish is in the ledger: it holds
    over restarts of the controller, and stands if --timeout is over first (exit code 1). Workers
    that were started by hand join and leave by hand: start one more, or press Ctrl-C.
    """
    from deploy.scaling import scale_to

    def say(line: str) -> None:
        if not as_json:
            print(line)

    scaled = scale_to(admin, workers, timeout_s=timeout, say=say)
    if as_json:
        print(scaled.as_json())
        return
    lanes = ", ".join(f"{name} {count}" for name, count in scaled.lanes.items())
    print(
        f"loader workers {scaled.workers_before} -> {scaled.workers_after}, "
        f"{scaled.lanes_moved} lanes moved in {scaled.seconds:.1f} s; lanes now: {lanes}"
    )


@told
@on_run()
def freeze(admin: AdminClient) -> None:
    """Hold the mixture in force until `headrace resume`."""
    admin.freeze(timeout_s=_TIMEOUT_S)
    print("the mixture is held")


@told
@on_run()
def resume(admin: AdminClient) -> None:
    """Give the decision back to the policy, after `mixture set` or `freeze`."""
    admin.resume(timeout_s=_TIMEOUT_S)
    print("the policy decides again")


@told
@on_run()
def snapshot(admin: AdminClient) -> None:
    """Save the policy's state on the controller's machine; print the path."""
    print(admin.snapshot_policy(timeout_s=_WORK_TIMEOUT_S))


@told
@on_run()
def drain(admin: AdminClient) -> None:
    """Tell controller and workers that the run is over: no more decisions.

    Ranks that still train get the steps that are decided already, then an error that says so.
    """
    admin.drain(timeout_s=_WORK_TIMEOUT_S)
    print("drained")


@told
def controller(
    run_file: Annotated[Path, typer.Argument(help="The run file.")],
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve figures for Prometheus there, at /metrics."),
    ] = None,
    standby: Annotated[
        bool,
        typer.Option(
            "--standby",
            help="Wait while another controller has the ledger; take over once that is dead.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log what happens, not warnings alone.")
    ] = False,
    log_format: Annotated[
        str | None, typer.Option(help="text or json. Default: HEADRACE_LOG_FORMAT, text.")
    ] = None,
    dashboard: DashboardOption = None,
) -> None:
    """Serve a run's controller in the foreground, outside Ray, until Ctrl-C or SIGTERM.

    Builds the dataset index first if there is none. Prints its address when it serves, and that of
    the live page if there is one.
    """
    import asyncio
    import logging

    from controller.__main__ import serve
    from controller.prepare import check_first
    from deploy.dataset import ensure_index
    from protos.log_format import configure_logging

    configure_logging(log_format, level=logging.INFO if verbose else logging.WARNING)
    config = with_page(with_metrics(load_run_file(run_file), metrics), dashboard)
    check_first(config, standby=standby)
    ensure_index(config)
    asyncio.run(serve(config, standby=standby))
