"""Places where a test has a process die or fail: before and after all that must be durable.

`HEADRACE_FAILPOINT=NAME:NTH:ACTION`, or several of them with commas between, arms them in a
controller or loader worker that is started so. At the NTH time that the process comes to the place,
the action happens:

    kill            SIGKILL, as of a machine that loses power
    stop            SIGSTOP, as of a virtual machine that is frozen; SIGCONT lets it go on
    EIO, ENOSPC...  the operating system's error of that name is raised, this time only

Unless armed, a place costs one comparison. Modules name their places when they are imported, so
that a test can go through all of them (`places`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from protos.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "HEADRACE_FAILPOINT"

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

_places: dict[str, str] = {}
_armed: dict[str, _Armed] | None = None
_lock = threading.Lock()


@dataclass(slots=True)
class _Armed:
    nth: int
    action: str
    num_hits: int = 0


class Failpoint:
    """A place in the code."""

    __slots__ = ("name",)

    def __init__(self, name: str, what: str) -> None:
        """Name the place; `what` says in words what has happened there, and what has not.

        Raises:
            ValueError: there is another place of that name.
        """
        if name in _places:
            raise ValueError(f"there are two failpoints {name!r}")
        _places[name] = what
        self.name = name

    def hit(self) -> None:
        """Do what this place is armed with; usually nothing.

        Raises:
            OSError: that is what it is armed with.
        """
        if _armed is not None:
            _strike(self.name)


class DurableWrite:
    """Two places: before something is durable, and after it is but nobody has heard of it."""

    __slots__ = ("_after", "_before")

    def __init__(self, name: str, what: str) -> None:
        self._before = Failpoint(f"{name}.before", f"before {what}")
        self._after = Failpoint(f"{name}.after", f"after {what}")

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Come by both places, one before the block and one after it."""
        self._before.hit()
        yield
        self._after.hit()


def places() -> Mapping[str, str]:
    """Return all places of the modules that were imported so far, by name."""
    return dict(_places)


def arm(environment: Mapping[str, str]) -> None:
    """Arm what the environment names; without it nothing is armed. Called when a process starts.

    Raises:
        ConfigError: a place or an action does not exist.
    """
    global _armed
    text = environment.get(VARIABLE, "")
    _armed = dict(map(_parse, text.split(","))) if text else None
    if _armed:
        logger.warning("%s is set: this process will fail on purpose at %s", VARIABLE, text)


def _parse(text: str) -> tuple[str, _Armed]:
    name, nth, action = (*text.strip().split(":"), "", "")[:3]
    if name not in _places:
        raise ConfigError(f"{VARIABLE}: there is no failpoint {name!r} in this process")
    if not nth.isdigit() or int(nth) < 1:
        raise ConfigError(f"{VARIABLE}: {text!r} must be NAME:NTH:ACTION, with NTH counted from 1")
    if action not in _SIGNALS and not hasattr(errno, action):
        raise ConfigError(
            f"{VARIABLE}: there is no action {action!r}; use kill, stop or the name of an error, "
            "such as EIO"
        )
    return name, _Armed(nth=int(nth), action=action)


def _strike(name: str) -> None:
    assert _armed is not None
    armed = _armed.get(name)
    if armed is None:
        return
    with _lock:
        armed.num_hits += 1
        if armed.num_hits != armed.nth:
            return
    # Written past all buffers: the process may be gone in a moment, and a test wants proof.
    os.write(sys.stderr.fileno(), f"failpoint {name} hit: {armed.action}\n".encode())
    if armed.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[armed.action])
        return
    number: int = getattr(errno, armed.action)
    raise OSError(number, f"{os.strerror(number)} (failpoint {name})")
