"""Actors that serve, controller and loader workers: started, watched, restarted, ended."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from controller.actor import ControllerActor
from controller.config import RunConfig
from deploy.ports import free_port
from deploy.processes import StopSignals
from protos.errors import AlreadyServing, HeadraceError, NotReady, Retryable
from protos.security import split_address

START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_LOOK_S = 0.2
_PORT_TRIES = 3

Say = Callable[[str], None]


class ActorState(enum.Enum):
    """STARTING <-> SERVING -> LEAVING -> STOPPED; from any to STOPPED."""

    STARTING = "starting"  # was told to serve and has not answered
    SERVING = "serving"
    LEAVING = "leaving"  # serves until others have taken over
    STOPPED = "stopped"


class WatchedActor:
    """An actor that Ray restarts and that is then told to serve again.

    Ray runs the constructor anew and no more; whoever made the actor must call `start`.
    """

    def __init__(self, name: str, actor: Any, *, ping: str, say: Say) -> None:
        self.name = name
        self._actor = actor
        self._ping = ping
        self._say = say
        self._is_lost = False
        self._fault = ""
        self.state = ActorState.STARTING
        self.address = ""
        """Where it serves, or did last; empty: it never has."""

        self.has_left = False
        """It was asked to leave, and is needed no more."""

        self._pending = actor.start.remote()

    def wait_started(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Return where the actor serves.

        Raises:
            HeadraceError: the actor cannot serve, or does not in time.
        """
        deadline = time.monotonic() + timeout_s
        # In slices: signals are not heard meanwhile.
        while not ray.wait([self._pending], timeout=_LOOK_S)[0]:
            if time.monotonic() >= deadline:
                raise NotReady(f"the {self.name} did not start within {timeout_s:g} s")
        try:
            address: str = ray.get(self._pending)
        except RayTaskError as error:
            raise _ours(error) from error
        except RayActorError as error:
            raise NotReady(f"the {self.name} died while it started: {error}") from error
        self._serving(address)
        return address

    def look(self) -> None:
        """See, without waiting, whether the actor lives; say so if it died or came back.

        Raises:
            HeadraceError: it lives and says that it cannot go on.
        """
        done, _ = ray.wait([self._pending], timeout=0)
        if not done:
            return
        if self.state is ActorState.LEAVING:
            self._look_leaving()
            return
        try:
            answer = ray.get(self._pending)
        except RayTaskError as error:
            ours = _ours(error)
            if self.state is not ActorState.STARTING or not isinstance(ours, Retryable):
                raise ours from error
            self._pending = self._actor.start.remote()
        except RayActorError:
            self._lost()
            self._pending = self._actor.start.remote()
        else:
            self._serving(answer)
            self._say_fault(getattr(answer, "error", ""))

    def _look_leaving(self) -> None:
        try:
            answer = ray.get(self._pending)
        except (RayTaskError, RayActorError):
            self._say(f"the {self.name} died while it was leaving")
            self.has_left = True
            return
        self.has_left = bool(getattr(answer, "has_left", False))
        self._pending = getattr(self._actor, self._ping).remote()

    def _say_fault(self, fault: str) -> None:
        """Say once why an actor that lives serves no more."""
        if fault and fault != self._fault:
            self._say(f"the {self.name} has ended: {fault}")
        self._fault = fault

    def _serving(self, answer: object) -> None:
        if isinstance(answer, str):
            self.address = answer
        if self._is_lost:
            self._say(f"the {self.name} serves again")
        self._is_lost = False
        self.state = ActorState.SERVING
        self._pending = getattr(self._actor, self._ping).remote()

    def _lost(self) -> None:
        if not self._is_lost:
            self._say(f"the {self.name} died; Ray starts it again")
        self._is_lost = True
        self.state = ActorState.STARTING

    def ask_to_leave(self) -> None:
        """Have it serve only until others have taken over; `look` sees when `has_left`."""
        self.state = ActorState.LEAVING
        self._actor.leave.remote()

    def ask_to_stop(self) -> Any:
        """Begin to stop; return what to wait for."""
        self.state = ActorState.STOPPED
        return self._actor.stop.remote()

    def mend(self) -> None:
        """If it lives and said that it cannot go on, have Ray start its process anew."""
        done, _ = ray.wait([self._pending], timeout=0)
        if not done:
            return
        try:
            ray.get(self._pending)
        except RayTaskError:
            with contextlib.suppress(Exception):
                ray.kill(self._actor, no_restart=False)
            self._lost()
            self._pending = self._actor.start.remote()
        except RayActorError:
            return

    def kill(self) -> None:
        """End the process."""
        with contextlib.suppress(Exception):
            ray.kill(self._actor, no_restart=True)


def stop_actors(actors: Sequence[WatchedActor], stop: StopSignals) -> None:
    """Have actors stop, then end their processes; a dead one does no harm."""
    waiting = []
    for actor in actors:
        with contextlib.suppress(RayActorError):
            waiting.append(actor.ask_to_stop())
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while waiting and (left_s := stop.patience_s(deadline - time.monotonic())):
        # In slices, as a signal may come meanwhile.
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(left_s, _LOOK_S))
    for actor in actors:
        actor.kill()


def start_controller(config: RunConfig, *, say: Say) -> tuple[WatchedActor, str]:
    """Start the run's controller; return it and where it serves.

    A port is chosen beforehand where the run file leaves it open: a controller that is started
    again must be found where it was.

    Raises:
        HeadraceError: it cannot serve.
    """
    host, port = split_address(config.address)
    for tries_left in reversed(range(_PORT_TRIES)):
        address = f"{host}:{port or free_port(host)}"
        fixed = config.model_copy(update={"address": address})
        options = ControllerActor.options(num_cpus=1, max_restarts=-1)
        controller = WatchedActor("controller", options.remote(fixed), ping="check", say=say)
        try:
            return controller, controller.wait_started()
        except AlreadyServing:
            controller.kill()
            # Another process may have taken the port since; a ledger stays taken.
            if port or not tries_left:
                raise
    raise AssertionError("the last try either returns or raises")


def _ours(error: RayTaskError) -> HeadraceError:
    """Return the error that an actor raised, without Ray's wrapping."""
    cause: BaseException | None = error.cause
    if isinstance(cause, HeadraceError):
        return cause
    return HeadraceError(f"an actor failed: {cause!r}")
