"""A run outside Ray as real processes: a supervised controller, loader workers, trainer ranks.

Its folder is laid out like that of `headrace run`, so that the same accounting reads it. Workers
are `tests.fakes_consumer.WorkerProcess`; `tests.faults.checker` decides afterwards what held.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from controller.config import load_run_file
from deploy.runfile import RUN_FILE
from protos.client import AdminClient
from protos.errors import HeadraceError
from protos.status import RunStatus
from tests.fakes_consumer import PLENTY_S, ROOT, WorkerProcess, write_run
from tests.faults.rank import EVENTS

LOOK_EVERY_S = 0.01

_HOPELESS = (1, 2)
"""Exit statuses of a controller that will never start: it crashed, or its run file is wrong."""


def free_address() -> str:
    """Return an address of this machine whose port is free, now and most likely later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def write_fault_run(out: Path, patterns: Mapping[str, str], **changes: Any) -> Path:
    """Write a run file whose controller can be found again after a restart: on a fixed port."""
    changes.setdefault("address", free_address())
    return write_run(out, patterns, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A controller process that was started."""

    pid: int
    started_s: float
    """Of CLOCK_MONOTONIC, like all times here."""

    ready_s: float | None
    """When it said that it serves; None: it ended before."""

    ended_s: float
    exit_status: int


class ControllerProcess:
    """A `python -m controller`; what it says goes to a log."""

    def __init__(
        self,
        run_file: Path,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        self.started_s = time.monotonic()
        self.ready_s: float | None = None
        self.log = log
        self._ready = threading.Event()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "controller", str(run_file), *options],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, name="controller-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if " ready at " in line:
                    self.ready_s = time.monotonic()
                    self._ready.set()

    @property
    def pid(self) -> int:
        """Of the process that was started: with a prefix it is the prefix's."""
        return self.process.pid

    def wait_ready(self, timeout_s: float = PLENTY_S) -> None:
        """Wait until it serves.

        Raises:
            AssertionError: it ended before, or does not serve in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(LOOK_EVERY_S):
            assert self.process.poll() is None, f"the controller ended: {self.said()}"
            assert time.monotonic() < deadline, f"no controller after {timeout_s:g} s"

    def said(self) -> str:
        """Return what it, and those before it with the same log, wrote on stderr."""
        return self.log.read_text(errors="replace")

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return what the process ended with."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.wait()

    def wait(self, timeout_s: float = PLENTY_S) -> int:
        """Return what it ended with."""
        status = self.process.wait(timeout_s)
        self._reader.join(PLENTY_S)
        return status

    def record(self) -> Start:
        """Return how it went; it has ended."""
        return Start(
            pid=self.pid,
            started_s=self.started_s,
            ready_s=self.ready_s,
            ended_s=time.monotonic(),
            exit_status=self.wait(),
        )


class Supervisor:
    """Starts a run's controller again whenever it ends, as systemd or Kubernetes would.

    thread      does                                     waits for
    supervisor  starts a controller, records its end     the process, `close`
    """

    def __init__(
        self,
        run_file: Path,
        *,
        log: Path,
        environments: Sequence[Mapping[str, str]] = (),
        first_prefix: Sequence[str] = (),
        may_start_again: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin; `environments` are added to those of the first starts, one each.

        `first_prefix` stands before the command of the first start. After an end the next start
        waits for `may_start_again`.
        """
        self._run_file = run_file
        self._log = log
        self._environments = list(environments)
        self._first_prefix = first_prefix
        self._may_start_again = may_start_again
        self._stopping = threading.Event()
        self.starts: list[Start] = []
        """Those that have ended, in order."""

        self.current = self._start()
        self._thread = threading.Thread(target=self._keep, name="supervisor", daemon=True)
        self._thread.start()

    def _start(self) -> ControllerProcess:
        number = len(self.starts)
        known = self._environments
        return ControllerProcess(
            self._run_file,
            log=self._log,
            environment=known[number] if number < len(known) else None,
            prefix=() if number else self._first_prefix,
        )

    def _keep(self) -> None:
        while True:
            self.current.process.wait()
            self.starts.append(self.current.record())
            while not self._stopping.is_set() and not self._may_start_again():
                self._stopping.wait(LOOK_EVERY_S)
            if self._stopping.is_set():
                return
            self.current = self._start()

    def wait_ready(self, timeout_s: float = PLENTY_S) -> None:
        """Wait until a controller serves, whichever start that takes.

        Raises:
            AssertionError: none does in time.
        """
        deadline = time.monotonic() + timeout_s
        while self.current.ready_s is None or self.current.process.poll() is not None:
            refused = bool(self.starts) and self.starts[-1].exit_status in _HOPELESS
            hopeless = refused or time.monotonic() > deadline
            assert not hopeless, f"no controller serves: {self.current.said()[-2000:]}"
            time.sleep(LOOK_EVERY_S)

    def wait_starts(self, number: int, timeout_s: float = PLENTY_S) -> None:
        """Wait until so many controllers have ended.

        Raises:
            AssertionError: they have not in time.
        """
        deadline = time.monotonic() + timeout_s
        while len(self.starts) < number:
            assert time.monotonic() < deadline, f"{len(self.starts)} controllers have ended"
            time.sleep(LOOK_EVERY_S)

    def kill(self) -> int:
        """SIGKILL the controller that runs now; return its pid once it has ended."""
        victim, number = self.current, len(self.starts)
        victim.process.kill()
        deadline = time.monotonic() + PLENTY_S
        while len(self.starts) == number:
            assert time.monotonic() < deadline, "the killed controller does not end"
            time.sleep(LOOK_EVERY_S)
        return victim.pid

    def close(self) -> None:
        """End the controller with SIGTERM and start no other; twice does no harm."""
        self._stopping.set()
        while self._thread.is_alive():
            # The thread may just have started another one.
            with contextlib.suppress(ProcessLookupError):
                self.current.process.terminate()
            self._thread.join(0.2)


class RankProcess:
    """A `python -m tests.faults.rank`."""

    def __init__(
        self,
        run: FaultRun,
        rank: int,
        world_size: int,
        *,
        until: int,
        step_s: float,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        self.rank = rank
        command = [*prefix, sys.executable, "-m", "tests.faults.rank", "--address", run.address]
        command += ["--rank", str(rank), "--world-size", str(world_size), "--until", str(until)]
        command += ["--out", str(run.out), "--step-s", str(step_s), *options]
        self.log = run.out / f"rank{rank}.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait(self, timeout_s: float) -> None:
        """Wait until it has trained all its steps.

        Raises:
            AssertionError: it failed.
        """
        status = self.process.wait(timeout_s)
        assert status == 0, f"rank {self.rank} ended with {status}: {self.log.read_text()[-2000:]}"


@dataclass
class FaultRun:
    """The processes of a run."""

    run_file: Path
    out: Path
    address: str
    controller: Supervisor
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    ranks: list[RankProcess] = field(default_factory=list)

    def add_worker(self, worker_id: str, *, options: Sequence[str] = ()) -> WorkerProcess:
        """Start a worker; returns before it is ready."""
        worker = WorkerProcess(
            self.address,
            worker_id,
            cache=self.out / "cache",
            log=self.out / f"{worker_id}.log",
            options=options,
        )
        self.workers[worker_id] = worker
        return worker

    def start_ranks(
        self, world_size: int, *, until: int, step_s: float, options: Sequence[str] = ()
    ) -> None:
        """Start a generation of ranks; returns at once."""
        self.ranks = [
            RankProcess(self, rank, world_size, until=until, step_s=step_s, options=options)
            for rank in range(world_size)
        ]

    def wait_ranks(self, timeout_s: float) -> None:
        """Wait until all ranks have trained all their steps."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.wait(max(deadline - time.monotonic(), 0.1))

    def are_training(self) -> bool:
        """Say whether every rank still trains."""
        return all(rank.process.poll() is None for rank in self.ranks)

    def status(self, timeout_s: float = 5.0) -> RunStatus:
        """Return the controller's word.

        Raises:
            HeadraceError: it does not answer.
        """
        admin = AdminClient(self.address)
        try:
            return admin.status(timeout_s=timeout_s)
        finally:
            admin.close()

    def num_alone(self) -> int:
        """Return how many steps every rank has ended without a controller, by its event log."""
        logs = [path.read_bytes() for path in (self.out / EVENTS).glob("rank*.jsonl")]
        return min((len(re.findall(rb'"degraded": true', log)) for log in logs), default=0)

    def last_logged_step(self) -> int:
        """Return the last step that every rank has ended, by their event logs; -1: none."""
        last = []
        for path in (self.out / EVENTS).glob("rank*.jsonl"):
            steps = re.findall(rb'"event": "step".*"step": (\d+)', path.read_bytes())
            last.append(max(map(int, steps), default=-1))
        return min(last, default=-1)

    def wait_observed(self, step: int, timeout_s: float = PLENTY_S) -> None:
        """Wait until the controller has decided upon `step`, over its restarts.

        Raises:
            AssertionError: it has not in time.
        """
        deadline = time.monotonic() + timeout_s
        observed = -1
        while observed < step:
            assert time.monotonic() < deadline, f"step {step} is not decided upon, {observed} is"
            with contextlib.suppress(HeadraceError):
                observed = self.status().observed_step
            time.sleep(LOOK_EVERY_S)

    def end(self) -> None:
        """End everything: ranks and workers at once, the controller in good order."""
        for rank in self.ranks:
            rank.process.kill()
            rank.process.wait(PLENTY_S)
        for worker in self.workers.values():
            worker.process.kill()
            worker.process.wait(PLENTY_S)
        self.controller.close()


@contextmanager
def fault_run(
    run_file: Path,
    *,
    num_workers: int = 2,
    environments: Sequence[Mapping[str, str]] = (),
    worker_options: Sequence[str] = (),
    may_start_again: Callable[[FaultRun], bool] = lambda run: True,
) -> Iterator[FaultRun]:
    """Start a run's controller and so many workers; at the end nothing of them is left.

    A controller that has ended is started again once `may_start_again`.
    """
    config = load_run_file(run_file)
    with ExitStack() as stack:
        run = FaultRun(
            run_file=run_file,
            out=config.out,
            address=config.address,
            controller=Supervisor(
                run_file,
                log=config.out / "controller.log",
                environments=environments,
                may_start_again=lambda: may_start_again(run),
            ),
        )
        stack.callback(run.end)
        for number in range(num_workers):
            run.add_worker(f"w{number}", options=worker_options)
        yield run


def change_run_file(run_file: Path, **changes: Any) -> None:
    """Change top-level keys of a run file, or parts of a section."""
    document = yaml.safe_load(run_file.read_text())
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(document.get(key), dict)
        document[key] = {**document[key], **value} if merge else value
    run_file.write_text(yaml.safe_dump(document, sort_keys=False))


__all__ = [
    "LOOK_EVERY_S",
    "PLENTY_S",
    "RUN_FILE",
    "ControllerProcess",
    "FaultRun",
    "RankProcess",
    "Start",
    "Supervisor",
    "change_run_file",
    "fault_run",
    "free_address",
    "write_fault_run",
]
