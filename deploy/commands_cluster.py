"""The commands about a run on a Ray cluster: `headrace up`, `down` and `logs`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from deploy.exits import stderr, told
from deploy.failures import Stopped
from deploy.on_run import name_of_run
from protos.errors import ConfigError

_ADDRESS = "The Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Default: what RAY_ADDRESS says, "
_ADDRESS += "or the cluster of this machine."
_RUN = "The run file, or the run's name. Default: the one run on the cluster."
_LOOK_EVERY_S = 0.5
_OPEN = (
    "warning: this Ray cluster asks for no token, so whoever reaches its ports can run anything as "
    "you: start it with RAY_AUTH_MODE=token (deploy/docs/ray-cluster.md)"
)

AddressOption = Annotated[str | None, typer.Option(help=_ADDRESS)]
RunArgument = Annotated[str | None, typer.Argument(help=_RUN)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


@told
def up(
    run_file: Annotated[Path, typer.Argument(help="The run file.")],
    address: AddressOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Loader workers, in place of workers.count.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return as soon as it serves, and leave it up.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve a run on an existing Ray cluster: a controller and loader workers, as Ray actors.

    The controller stays on the head node (or where cluster.controller_labels say), with the run's
    folder, and is restarted there on the same ledger; workers lie spread over the nodes. All nodes
    need the same Headrace, the shards, and the files that `security` names, at the same paths.

    Without --detach the command stays, says what happens, and takes the run down when all its steps
    are done, or at Ctrl-C. If it dies, or with --detach, the run stays up until `headrace down`. A
    second `up` finds a run that is up, which its own Ctrl-C then leaves alone, and refuses if the
    file says otherwise than what is running.
    """
    from controller.config import load_run_file
    from deploy.cluster import bring_up, ensure_data, number_of_nodes
    from deploy.cluster_config import for_cluster
    from deploy.cluster_connection import on_cluster

    config = load_run_file(run_file)

    def say(line: str) -> None:
        stderr.print(line, markup=False, highlight=False, soft_wrap=True)

    with on_cluster(address, run=config.run):
        config = for_cluster(config, workers=workers, num_nodes=number_of_nodes())
        ensure_data(config, say=say)
        found = bring_up(config, say=say)
        if not found.has_token:
            say(_OPEN)
        if as_json:
            print(json.dumps(found.as_json(), indent=2), flush=True)
        else:
            how = "is up already" if found.is_adopted else "is up"
            print(
                f"run {found.run!r} {how}: controller at {found.address}, "
                f"{len(found.endpoints)} loader workers, nodes: {', '.join(found.nodes)}\n"
                f'trainers: trainer_client.connect("{found.address}")',
                flush=True,
            )
            if found.page:
                print(f"live page: {found.page}, as the controller's node reaches it", flush=True)
        if not detach:
            _stay(config.run, was_up=found.is_adopted, say=say)


def _stay(run: str, *, was_up: bool, say: Callable[[str], None]) -> None:
    """Say what happens until all steps are done, then take the run down.

    A signal takes it down earlier, if it was started here.
    """
    from deploy.cluster import bring_down, keeper_state
    from deploy.processes import StopSignals
    from protos.errors import NotReady

    with StopSignals() as stop:
        num_heard = keeper_state(run).num_lines
        while not stop.wait(_LOOK_EVERY_S):
            try:
                state = keeper_state(run, num_heard)
            except NotReady as error:
                # Ray starts it again.
                say(str(error))
                continue
            num_heard = state.num_lines
            for line in state.lines:
                say(line)
            if state.is_finished:
                say("all steps are done")
                break
        if stop.asked and was_up:
            raise Stopped(f"run {run!r} was up before and stays so; `headrace down {run}` ends it")
        bring_down(run, say=say)
        if stop.asked:
            raise Stopped(f"run {run!r} was taken down; its ledger stays, and `up` goes on with it")


@told
def down(
    run: RunArgument = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a run off a Ray cluster: drain it, end workers and controller, give back their places.

    The ledger stays, and `headrace up` goes on with it. Where nothing is up, nothing is done.
    """
    from deploy.cluster import bring_down, the_run
    from deploy.cluster_connection import on_cluster

    named = name_of_run(run)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if not as_json:
            print(line, flush=True)

    found, was_up = named, False
    if found is None:
        with on_cluster(address, run=None):
            found = the_run()
    if found is not None:
        # Placement groups are found within the run's namespace only.
        with on_cluster(address, run=found):
            was_up = bring_down(found, say=say)
    if as_json:
        print(json.dumps({"run": found, "was_up": was_up, "lines": lines}, indent=2))
    elif found is None:
        print("no run is up on this cluster")
    else:
        print(f"run {found!r} is down" if was_up else f"run {found!r} was not up")


@told
def logs(
    who: Annotated[
        str, typer.Argument(help="controller, keeper (which watches the others) or worker-N.")
    ] = "controller",
    run: RunArgument = None,
    address: AddressOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as more is written, until Ctrl-C.")
    ] = False,
    last: Annotated[
        int, typer.Option(min=1, help="How many bytes to begin with, counted from the end.")
    ] = 64_000,
) -> None:
    """Print what an actor of a run on a Ray cluster has logged since its process began."""
    from deploy.cluster import the_run
    from deploy.cluster_connection import on_cluster

    named = name_of_run(run)
    with on_cluster(address, run=named):
        # Imports Ray, which must find the environment that `on_cluster` has prepared.
        from deploy.cluster_logs import log_parts

        found = named or the_run()
        if found is None:
            raise ConfigError("no run is up on this cluster; `headrace up RUN_FILE` starts one")
        for part in log_parts(found, who, last=last, follow=follow):
            if part is None:
                time.sleep(_LOOK_EVERY_S)
            else:
                print(part, end="", flush=True)
