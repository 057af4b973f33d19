"""Keeps a run on a cluster as its run file says: an actor that starts, watches and scales others.

Ray restarts a process that died, and runs its constructor and no more. Somebody must tell a
controller or a worker to serve again; the command that started them has long ended. A keeper that
is restarted itself takes up the actors that are there.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from controller.config import RunConfig
from deploy.actors import START_TIMEOUT_S, WatchedActor
from deploy.autoscale import Autoscaler, Sample
from deploy.node_actors import AtNode
from deploy.placing import (
    ClusterMaker,
    Places,
    actors_of,
    controller_of,
    not_placed,
    worker_numbers,
)
from deploy.pool import WorkerPool
from deploy.runfile import ADDRESS
from deploy.whole_file import write_whole
from protos.client import AdminClient
from protos.errors import HeadraceError, NotReady
from protos.log_format import configure_logging, set_coordinates
from protos.status import RunStatus

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_STATUS_TIMEOUT_S = 2.0
_LINES_KEPT = 500
_MEND_EVERY_S = 10.0


class Phase(enum.Enum):
    """STARTING -> SERVING, or FAILED; a keeper that rests does nothing more."""

    STARTING = "starting"
    SERVING = "serving"
    FAILED = "failed"
    RESTING = "resting"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperState:
    """How a run on a cluster stands."""

    phase: Phase
    address: str
    """Of the controller; empty while it is not known."""

    page: str
    """Where the live page is; empty: there is none."""

    has_token: bool
    """The cluster lets nobody in without its token."""

    error: HeadraceError | None
    """Why it failed."""

    workers: dict[str, str]
    """Each worker's state, by name."""

    endpoints: dict[str, str]
    """Where each of them serves ranks, by name."""

    is_finished: bool
    """Every step of the run has been reported."""

    lines: tuple[str, ...]
    """What happened since the caller asked last, a line each."""

    num_lines: int
    """How many lines there have been in all."""


class Keeper(AtNode):
    """One run's keeper; `ray.remote(Keeper)` makes the actor."""

    def __init__(self, config: RunConfig, made_by: str) -> None:
        configure_logging(level=logging.INFO, anew=True)
        # Ray warns of groups that go before their actors; here they go after them.
        logging.getLogger("ray.actor").setLevel(logging.ERROR)
        set_coordinates(run=config.run)
        self._config = config
        self._made_by = made_by
        self._lock = threading.Lock()
        self._rest = threading.Event()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._state = KeeperState(
            phase=Phase.STARTING,
            address="",
            # The keeper is on the controller's machine, whose name the address may hold.
            page=config.dashboard.url(config.wire_security) if config.dashboard else "",
            # Ray's processes pass what they were started with on to their actors.
            has_token=os.environ.get("RAY_AUTH_MODE") == "token",
            error=None,
            workers={},
            endpoints={},
            is_finished=False,
            lines=(),
            num_lines=0,
        )
        self._controller: WatchedActor | None = None
        self._pool: WorkerPool | None = None
        self._admin: AdminClient | None = None
        self._scaler = _scaler(config)
        self._mended_s = 0.0
        self._has_said_size = False
        self._thread = threading.Thread(target=self._keep, name="headrace-keeper", daemon=True)
        self._thread.start()

    def running(self) -> tuple[RunConfig, str]:
        """Return the run as it was started, and by which call of `headrace up`."""
        return self._config, self._made_by

    def state(self, num_heard: int = 0) -> KeeperState:
        """Return how things stand, with the lines beyond the first `num_heard`."""
        with self._lock:
            fresh = self._state.num_lines - num_heard
            lines = tuple(self._lines)[-fresh:] if fresh > 0 else ()
            return replace(self._state, lines=lines)

    def rest(self, timeout_s: float = 10.0) -> None:
        """Look after nothing any more: whatever ends from now on stays ended."""
        self._rest.set()
        self._thread.join(timeout_s)
        self._set(phase=Phase.RESTING)
        with contextlib.suppress(OSError):
            (self._config.out / ADDRESS).unlink(missing_ok=True)

    def _keep(self) -> None:
        try:
            self._bring_up()
        except (HeadraceError, RayError) as error:
            ours = error if isinstance(error, HeadraceError) else HeadraceError(str(error))
            self._say(f"the run could not be started: {ours}")
            self._set(phase=Phase.FAILED, error=ours)
            return
        while not self._rest.wait(_LOOK_EVERY_S):
            try:
                self._look()
            except (HeadraceError, RayError) as error:
                self._mend(error)

    def _bring_up(self) -> None:
        """Start what is missing, take up what is there."""
        there = worker_numbers(list(actors_of(self._config.run)))
        actor = controller_of(self._config)
        self._controller = WatchedActor("controller", actor, ping="check", say=self._say)
        places = Places(self._config.run, self._config.cluster)
        numbers = there or list(range(self._config.workers.count))
        self._has_said_size = bool(there)
        places.expect(numbers)
        address = self._where_controller(actor)
        self._pool = WorkerPool(
            self._config,
            address,
            None,
            say=self._say,
            maker=ClusterMaker(self._config, places),
        )
        # Beside the controller: they ask until it answers.
        self._pool.begin(numbers)
        serving = self._controller.wait_started()
        self._say(f"the controller serves at {serving}")
        self._publish(serving)
        if not places.wait(START_TIMEOUT_S):
            raise NotReady(_no_room(self._config, len(numbers)))
        self._pool.wait_started()
        self._say(f"{len(numbers)} loader workers serve")
        self._refresh(Phase.SERVING)

    def _where_controller(self, actor: Any) -> str:
        try:
            return str(ray.get(actor.serves_at.remote(), timeout=START_TIMEOUT_S))
        except ray.exceptions.GetTimeoutError:
            raise not_placed("controller", START_TIMEOUT_S) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def _publish(self, address: str) -> None:
        """Tell the run's folder where the controller is, for commands on this machine."""
        self._set(address=address)
        with contextlib.suppress(OSError):
            write_whole(self._config.out / ADDRESS, address + "\n")

    def _look(self) -> None:
        assert self._controller is not None, "it has been brought up"
        assert self._pool is not None, "it has been brought up"
        self._controller.look()
        self._pool.look()
        status = self._ask()
        if status is not None:
            if status.wanted_workers:
                self._pool.scale(status.wanted_workers)
            self._autoscale(status)
            self._set(is_finished=status.observed_step >= status.num_steps - 1)
        self._refresh()

    def _autoscale(self, status: RunStatus) -> None:
        """Wish for more or fewer workers, as an operator would."""
        assert self._pool is not None, "it has been brought up"
        if self._scaler is None or self._admin is None:
            return
        now = Sample(at_s=time.monotonic(), wait_s=status.data_wait_s, step_s=status.step_s)
        wanted = self._scaler.decide(self._pool.size, now)
        if wanted != self._pool.size:
            why = (
                "ranks wait for data" if wanted > self._pool.size else "ranks have long not waited"
            )
            self._say(f"{wanted} loader workers are wanted: {why}")
            self._admin.scale(wanted, timeout_s=_STATUS_TIMEOUT_S)

    def _ask(self) -> RunStatus | None:
        """Return what the controller says; None: nothing, or not yet what counts."""
        assert self._pool is not None, "it has been brought up"
        if self._admin is None:
            self._admin = AdminClient(self._state.address, security=self._config.wire_security)
        try:
            if not self._has_said_size:
                # Else a wish of before the run was taken down would count.
                self._admin.scale(self._pool.size, timeout_s=_STATUS_TIMEOUT_S)
                self._has_said_size = True
            return self._admin.status(timeout_s=_STATUS_TIMEOUT_S)
        except HeadraceError:
            # Its actor is watched, and training goes on without it.
            return None

    def _mend(self, error: HeadraceError | RayError) -> None:
        """Say what cannot go on as it is; have it tried again, not too often."""
        if time.monotonic() - self._mended_s < _MEND_EVERY_S:
            return
        self._mended_s = time.monotonic()
        self._say(f"trying again: {error}")
        for each in (self._controller, *(self._pool.workers.values() if self._pool else ())):
            if each is not None:
                each.mend()

    def _refresh(self, phase: Phase | None = None) -> None:
        assert self._pool is not None, "it has been brought up"
        found = {f"worker-{number}": each for number, each in sorted(self._pool.workers.items())}
        self._set(
            workers={name: each.state.value for name, each in found.items()},
            endpoints={name: each.address for name, each in found.items()},
            **({"phase": phase} if phase else {}),
        )

    def _set(self, **changes: object) -> None:
        with self._lock:
            self._state = replace(self._state, **changes)  # type: ignore[arg-type]

    def _say(self, line: str) -> None:
        logger.info("%s", line)
        with self._lock:
            self._lines.append(line)
            self._state = replace(self._state, num_lines=self._state.num_lines + 1)


def _scaler(config: RunConfig) -> Autoscaler | None:
    workers = config.workers
    if workers.min is None or workers.max is None:
        return None
    return Autoscaler(
        least=workers.min,
        # A worker beyond the lanes would have none.
        most=min(workers.max, config.batch.lanes),
        grow_after_s=workers.grow_after_s,
        shrink_after_s=workers.shrink_after_s,
    )


def _no_room(config: RunConfig, count: int) -> str:
    cluster = config.cluster
    needs = [f"{cluster.worker_cpus:g} CPUs"]
    needs += [f"{amount:g} {name}" for name, amount in cluster.worker_resources.items()]
    needs += [f"the label {name}={value}" for name, value in cluster.worker_labels.items()]
    return (
        f"the cluster has no room for {count} loader workers of {', '.join(needs)} "
        f"({cluster.placement}) after {START_TIMEOUT_S:g} s: `ray status` shows what is free; add "
        "nodes, or change workers.count or the `cluster` section"
    )


KeeperActor: Any = ray.remote(Keeper)
