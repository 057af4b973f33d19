"""Processes that the harness starts: each ends when the harness does, whatever it was doing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

TERMINATE_GRACE_S = 10.0
"""How long a process has to end by itself before it is killed."""

ORDERLY_S = 2.0
"""How long after a signal everything may end in its own way; what lives then is killed."""

_POLL_S = 0.05
_GONE_S = 0.8
"""How long the kernel may take to end what was killed."""

_PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""


class StopSignals:
    """Ctrl-C and SIGTERM as an event: the first asks to stop, a second one to hurry.

    Python's own handlers are put back on leaving.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._hurry = threading.Event()
        self._former: dict[int, object] = {}
        self._raises = False
        self._asked_s = 0.0
        self.signal: int | None = None

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Take the signals; again, if a library has taken them meanwhile, as `ray.init` does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            former = signal.signal(number, self._handle)
            self._former.setdefault(number, former)

    def heard(self, number: int) -> None:
        """Take the signals again from a library that has answered `number` in its own way."""
        self._raises = False
        self._note(number)
        self.install()

    def _note(self, number: int) -> None:
        if self._asked.is_set():
            self._hurry.set()
        else:
            self.signal, self._asked_s = number, time.monotonic()
            self._asked.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if self._raises:
            # Once: what is tidied up then must not be interrupted.
            self._raises = False
            raise KeyboardInterrupt

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Have the next signal end the block with a KeyboardInterrupt."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    @property
    def asked(self) -> bool:
        """Somebody wants the run to stop."""
        return self._asked.is_set()

    @property
    def hurry(self) -> bool:
        """Somebody asked twice."""
        return self._hurry.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody asks to stop; say whether they did."""
        return self._asked.wait(timeout_s)

    def patience_s(self, usual_s: float) -> float:
        """Return how long to wait now for what else has `usual_s`: less once somebody asked."""
        if self.hurry:
            return 0.0
        left_s = self._asked_s + ORDERLY_S - time.monotonic() if self.asked else usual_s
        return max(min(left_s, usual_s), 0.0)


class ChildProcess:
    """A program in a process group of its own, with its output in a file."""

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        self.log = log
        self._family: dict[int, int] = {}
        self._log_start = log.stat().st_size if log.exists() else 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # A session of its own: Ctrl-C in the terminal reaches the harness alone, which then
            # ends the trainer before what the trainer depends on.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        # Remembered while they can be found: were the program killed, its children would be
        # nobody's.
        self._family |= descendants(self._process.pid)
        return self._process.poll()

    def stop(self, stop: StopSignals, *, grace_s: float = TERMINATE_GRACE_S) -> None:
        """End the process and everything that it started; kill what does not end in time."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self._process.poll() is None and stop.patience_s(deadline - time.monotonic()):
            self._family |= descendants(self._process.pid)
            time.sleep(_POLL_S)
        # Ranks have sessions of their own, so a group's signal would not reach them.
        _kill(self._family)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def last_lines(self, num_lines: int = 20) -> list[str]:
        """Return the end of what the program wrote."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - 64_000))
            return file.read().decode("utf-8", "replace").splitlines()[-num_lines:]


class Family:
    """All that this process starts from now on, and what that starts; for a process' main thread.

    Whoever loses its parent becomes a child of this process, so that none is out of sight.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self._others = descendants(os.getpid()).keys()

    def members(self) -> dict[int, int]:
        """Return those that live, with start times."""
        found = descendants(os.getpid())
        return {
            pid: started
            for pid, started in found.items()
            if pid not in self._others and _lives(pid)
        }

    def end(self) -> None:
        """Kill all of them, and what they start meanwhile; wait until they are gone."""
        deadline = time.monotonic() + _GONE_S
        while (found := self.members()) and time.monotonic() < deadline:
            _kill(found)
            time.sleep(_POLL_S)


def _kill(processes: Mapping[int, int]) -> None:
    """Kill processes, given with start times."""
    for pid, started in processes.items():
        if _start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> dict[int, int]:
    """Return the processes below `pid`, with start times: a number may be given anew."""
    parents: dict[int, list[int]] = {}
    for child, parent in _processes():
        parents.setdefault(parent, []).append(child)
    found: dict[int, int] = {}
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            started = _start_time(child)
            if started is not None and child not in found:
                found[child] = started
                waiting.append(child)
    return found


def _processes() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat_fields(int(entry.name))
            if fields is not None:
                yield int(entry.name), int(fields[1])


def _start_time(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def _lives(pid: int) -> bool:
    fields = _stat_fields(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third on; None: there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold spaces and parentheses itself.
    return text[text.rindex(")") + 2 :].split()
