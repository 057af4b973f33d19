"""`headrace run`, or another command, as a process of its own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("code", "mail", "prose")
NUM_STEPS = 60

_LISTEN = "0A"
"""A TCP socket's state in /proc/net/tcp."""

MARK = "HEADRACE_TEST_MARK"
"""In the environment of all that a run starts: a process is found by it wherever it hangs."""

SCHEDULE = (
    "policy.points=[{step: 0, mixture: uniform},"
    " {step: 7, mixture: {code: 0.62, mail: 0.05, prose: 0.33}},"
    " {step: 31, mixture: {mail: 0.5, prose: 0.5}},"
    " {step: 52, mixture: {code: 0.1, mail: 0.2, prose: 0.7}}]"
)

SMALL = (
    *("--steps", str(NUM_STEPS), "--sequence-length", "32", "--global-sequences", "8"),
    *("--lanes", "4", "--set", "batch.window_samples=8", "--digest"),
)


def write_corpus(folder: Path, *, documents: int = 60) -> Path:
    """Write three domains whose texts differ, with documents of many lengths."""
    folder.mkdir()
    for number, name in enumerate(DOMAINS):
        lines = []
        for index in range(documents):
            words = [f"{name}{(index * 7 + word * (number + 3)) % 97}" for word in range(index * 3)]
            text = f"{name} document {index}. " + " ".join(words)
            lines.append(json.dumps({"text": text}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the processes that live with this `MARK` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@dataclass
class Traces:
    """What a run could leave behind, as seen while it ran."""

    pids: set[int] = field(default_factory=set)
    sockets: set[str] = field(default_factory=set)
    """Inodes of those that listen; a port may soon be another's."""


class HarnessRun:
    """A command in a session of its own, as a terminal would start it."""

    def __init__(
        self,
        arguments: list[str],
        *,
        log: Path,
        command: str = "run",
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._mark = uuid.uuid4().hex
        self.log = log
        # Short, as Ray puts sockets below it, and empty again afterwards if nothing is left.
        self.temporary = Path(tempfile.mkdtemp(prefix="hrt-", dir="/tmp"))
        marks = {MARK: self._mark, "TMPDIR": str(self.temporary)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "deploy.cli", command, *arguments],
                cwd=ROOT,
                env={**os.environ, **(environment or {}), **marks},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """Return what it has said so far."""
        return self.log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Return the processes that belong to the run and live."""
        return marked_processes(self._mark)

    def traces(self) -> Traces:
        """Look at what the run holds now."""
        traces, listening = Traces(), listening_sockets()
        for process in self.processes():
            traces.pids.add(process.pid)
            traces.sockets |= _open_sockets(process.pid) & listening
        return traces

    def interrupt(self) -> None:
        """Press Ctrl-C: the signal goes to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self.processes():
            process.kill()
        self.process.wait(10)


@contextmanager
def harness_run(
    arguments: list[str],
    *,
    log: Path,
    command: str = "run",
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[HarnessRun]:
    """Start a command, after `prefix`; at the end nothing of it is left."""
    run = HarnessRun(arguments, log=log, command=command, environment=environment, prefix=prefix)
    try:
        yield run
    finally:
        run.end()
        subprocess.run(["rm", "-rf", str(run.temporary)], check=True)


def complete(
    arguments: list[str], *, log: Path, timeout_s: float = 120, prefix: Sequence[str] = ()
) -> HarnessRun:
    """Run to the end and expect that it goes well."""
    with harness_run(arguments, log=log, prefix=prefix) as run:
        code = run.process.wait(timeout_s)
        assert code == 0, run.text()
        return run


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Wait for something that can only be seen by looking.

    Raises:
        AssertionError: it does not come.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def listening_sockets() -> set[str]:
    """Return the inodes of all TCP sockets that listen."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                found.add(fields[9])
    return found


def _open_sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(descriptor.readlink())
                if name.startswith("socket:["):
                    found.add(name[len("socket:[") : -1])
    return found


def abandoned_shared_memory(before: set[str]) -> set[str]:
    """Return what is new in /dev/shm and no living process has open: others may use it too."""
    new = {path.name for path in Path("/dev/shm").iterdir()} - before
    used: set[str] = set()
    for process in psutil.process_iter():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            files = [file.path for file in process.open_files()]
        except (psutil.Error, OSError):
            continue
        used |= {name for name in new if f"/dev/shm/{name}" in maps}
        used |= {name for name in new if f"/dev/shm/{name}" in files}
    return new - used


def assert_nothing_left(run: HarnessRun, traces: Traces, shm_before: set[str]) -> None:
    """Expect that nothing is left of a command that has ended: process, port, file."""
    # What was killed needs a moment of a busy machine to be gone.
    wait_until(lambda: not run.processes(), timeout_s=3, what="the end of all processes")
    assert not traces.sockets & listening_sockets()
    left = [str(path.relative_to(run.temporary)) for path in run.temporary.rglob("*")]
    assert left == [], (left, run.text())
    # What others on this machine make there goes away again by itself; what is left stays.
    wait_until(
        lambda: not abandoned_shared_memory(shm_before), timeout_s=20, what="an empty /dev/shm"
    )
