"""A run on an existing Ray cluster: brought up once, found again, brought down."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from controller.config import RunConfig
from deploy.cluster_config import check_same
from protos.errors import ConfigError, HeadraceError, NotReady
from protos.security import split_address

_POLL_S = 0.1
_CALL_S = 30.0
_UP_S = 180.0
"""More than all waits of a keeper that brings a run up."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    """A run that serves."""

    run: str
    address: str
    """Of the controller, for trainers."""

    endpoints: dict[str, str]
    """Where each worker serves ranks, by name."""

    page: str
    """Where the live page is; empty: there is none."""

    has_token: bool
    """The cluster lets nobody in without its token."""

    is_adopted: bool
    """It was up already."""

    @property
    def nodes(self) -> list[str]:
        """The addresses of the nodes that workers are on."""
        return sorted({split_address(each)[0] for each in self.endpoints.values() if each})

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "run": self.run,
            "address": self.address,
            "workers": self.endpoints,
            "page": self.page or None,
            "adopted": self.is_adopted,
        }


def number_of_nodes() -> int:
    """Return how many nodes of the cluster are alive."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(bool(node["Alive"]) for node in nodes)


def ensure_data(config: RunConfig, *, say: Say) -> None:
    """Build the run's dataset index, where its controller will be, if it is not seen from here.

    Raises:
        DataError: shards are missing or unreadable.
    """
    if config.data.index.exists():
        return
    import ray

    from deploy.dataset import ensure_index
    from deploy.placing import beside_head

    say(
        f"there is no index {config.data.index} here: it is looked for where the controller will "
        "be, and built if it is not there either"
    )

    def build() -> None:
        ensure_index(config)

    try:
        ray.get(ray.remote(build).options(**beside_head(config.cluster)).remote())
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, HeadraceError) else error) from None


def the_run() -> str | None:
    """Return the name of the one run that is up on the cluster; None: there is none.

    Raises:
        ConfigError: there are several.
    """
    from deploy.placing import runs_on_cluster

    runs = runs_on_cluster()
    if len(runs) > 1:
        raise ConfigError(f"several runs are up on this cluster: say which, of {', '.join(runs)}")
    return runs[0] if runs else None


def bring_up(config: RunConfig, *, say: Say, timeout_s: float = _UP_S) -> Up:
    """Have a run served on the cluster that this process is connected to.

    A run that is up already with the same configuration is left as it is.

    Raises:
        ConfigError: it is up with another configuration.
        HeadraceError: what kept it from being served; nothing of it is left then.
        KeyboardInterrupt: likewise.
    """
    from deploy.keeper import KeeperActor
    from deploy.placing import KEEPER, beside_head, detached

    call = uuid.uuid4().hex
    options = {**detached(config.run, KEEPER), **beside_head(config.cluster)}
    keeper = KeeperActor.options(**options, max_concurrency=4).remote(config, call)
    running, made_by = _ask(keeper.running.remote(), "keeper")
    is_adopted = made_by != call
    if is_adopted:
        check_same(config, running)
    try:
        return _wait_up(config.run, keeper, is_adopted=is_adopted, say=say, timeout_s=timeout_s)
    except (HeadraceError, KeyboardInterrupt):
        if not is_adopted:
            bring_down(config.run, say=say)
        raise


def _wait_up(run: str, keeper: Any, *, is_adopted: bool, say: Say, timeout_s: float) -> Up:
    from deploy.keeper import Phase

    num_heard, deadline = 0, time.monotonic() + timeout_s
    while True:
        state = _ask(keeper.state.remote(num_heard), "keeper")
        for line in state.lines if not is_adopted else ():
            say(line)
        num_heard = state.num_lines
        if state.phase is Phase.SERVING:
            return Up(
                run=run,
                address=state.address,
                endpoints=state.endpoints,
                page=state.page,
                has_token=state.has_token,
                is_adopted=is_adopted,
            )
        if state.phase is not Phase.STARTING or time.monotonic() > deadline:
            raise state.error or NotReady(
                f"run {run!r} does not serve after {timeout_s:g} s ({state.phase.value})"
            )
        time.sleep(_POLL_S)


def keeper_state(run: str, num_heard: int = 0) -> Any:
    """Return the `KeeperState` of a run.

    Raises:
        ConfigError: the run is not up on this cluster.
    """
    import ray

    from deploy.placing import KEEPER, namespace, runs_on_cluster

    try:
        keeper = ray.get_actor(KEEPER, namespace=namespace(run))
    except ValueError:
        others = ", ".join(runs_on_cluster()) or "none"
        raise ConfigError(
            f"run {run!r} is not up on this cluster (up are: {others}); `headrace up RUN_FILE`"
        ) from None
    return _ask(keeper.state.remote(num_heard), "keeper")


def bring_down(run: str, *, say: Say) -> bool:
    """End whatever there is of a run on the cluster; say whether there was anything.

    Trainers get the steps that are decided already, then an error that says so.
    """
    import ray

    from deploy.placing import CONTROLLER, KEEPER, Places, actors_of

    actors = actors_of(run)
    keeper, controller = actors.pop(KEEPER, None), actors.pop(CONTROLLER, None)
    if keeper is not None:
        # First of all, else it would start again what ends now.
        _try(lambda: ray.get(keeper.rest.remote(), timeout=_CALL_S), say)
        ray.kill(keeper, no_restart=True)
    if controller is not None:
        _try(lambda: ray.get(controller.drain.remote(), timeout=_CALL_S), say)
    if actors:
        stopping = [worker.stop.remote() for worker in actors.values()]
        ray.wait(stopping, num_returns=len(stopping), timeout=_CALL_S)
        for worker in actors.values():
            ray.kill(worker, no_restart=True)
        say(f"{len(actors)} loader workers have ended")
    if controller is not None:
        _try(lambda: ray.get(controller.stop.remote(), timeout=2 * _CALL_S), say)
        ray.kill(controller, no_restart=True)
        say("the controller has ended")
    num_groups = Places.remove_all(run)
    return bool(keeper or controller or actors or num_groups)


def _try(call: Callable[[], object], say: Say) -> None:
    """Do what a dead actor cannot do any more; say what it was."""
    from ray.exceptions import GetTimeoutError, RayError

    try:
        call()
    except (RayError, GetTimeoutError) as error:
        say(f"ended without being asked: {str(error).strip().partition(chr(10))[0]}")


def _ask(pending: Any, name: str) -> Any:
    """Return an actor's answer.

    Raises:
        NotReady: it does not answer in time, or has died.
    """
    import ray

    from deploy.placing import not_placed

    try:
        return ray.get(pending, timeout=2 * _CALL_S)
    except ray.exceptions.GetTimeoutError:
        raise not_placed(name, 2 * _CALL_S) from None
    except ray.exceptions.RayActorError as error:
        raise NotReady(f"the {name} has died: {_first_cause(str(error))}") from error


def _first_cause(text: str) -> str:
    if "ModuleNotFoundError" in text:
        missing = text.rpartition("ModuleNotFoundError")[2].partition("\n")[0].strip(": ")
        return f"{missing}; install headrace[server] in the same version on every node"
    return text.strip().partition("\n")[0]
