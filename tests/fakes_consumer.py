"""A run whose trainers only consume: real controller, worker processes and wire; no torch training.

Its folder is laid out like that of `headrace run`, so that the same accounting reads it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import trainer_client
from controller.app import run_controller
from controller.config import load_run_file
from deploy.dataset import ensure_index
from deploy.history import Delivery, read_deliveries
from deploy.runfile import RUN_FILE
from deploy.training import RECEIVED
from loader_workers.worker import DRAIN_S
from protos.client import AdminClient
from protos.status import RunStatus
from tests.fakes_loader import write_token_shards
from trainer_client.feed import Feed

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("web", "code", "books")
PLENTY_S = 60.0
"""More than anything takes here, however busy the machine is."""

SCHEDULE = {
    "name": "schedule",
    "points": [
        {"step": 0, "mixture": {"web": 0.6, "code": 0.3, "books": 0.1}},
        {"step": 9, "mixture": {"web": 0.05, "code": 0.05, "books": 0.9}},
        {"step": 17, "mixture": {"web": 0.5, "code": 0.5}},
        {"step": 26, "mixture": {"web": 0.3, "code": 0.37, "books": 0.33}},
    ],
}

State = dict[str, Any]
AfterStep = Callable[[int], None]


def write_corpus(folder: Path, *, documents: Sequence[int] = (60, 45, 30)) -> dict[str, str]:
    """Write token shards of unequal domains; no token occurs twice. Return their patterns."""
    draw = random.Random(5)
    patterns, token = {}, 1
    for name, count in zip(DOMAINS, documents, strict=True):
        lengths = [[draw.choice((0, 1, 7, 20, 45)) for _ in range(count // 3)] for _ in range(3)]
        patterns[name] = write_token_shards(folder, name, lengths, first_token=token)
        token += sum(map(sum, lengths))
    return patterns


def write_run(out: Path, patterns: Mapping[str, str], **changes: Any) -> Path:
    """Write a run file and its index; `changes` replace whole keys, or parts of a section."""
    document: dict[str, Any] = {
        "run": "consumed",
        "seed": 11,
        "steps": 40,
        "out": str(out),
        "address": "127.0.0.1:0",
        "data": {
            "index": str(out / "index.parquet"),
            "vocab_size": 60_000,
            "eot_id": 0,
            "domains": {name: {"shards": [pattern]} for name, pattern in patterns.items()},
        },
        "batch": {
            "global_sequences": 20,
            "sequence_length": 16,
            "lanes": 5,
            "window_samples": 8,
            "interleave": 2,
        },
        "policy": SCHEDULE,
        # A busy machine must change no plan: nobody gives anybody up by time alone.
        "control": {"report_grace_s": PLENTY_S, "degraded_after_s": PLENTY_S},
    }
    for key, value in changes.items():
        merge = isinstance(value, dict) and key in document and key != "policy"
        document[key] = {**document[key], **value} if merge else value
    out.mkdir(parents=True)
    path = out / RUN_FILE
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    ensure_index(load_run_file(path))
    return path


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the one loop of all controllers: gRPC's poller outlives a closed loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="consumed-runs", daemon=True).start()
    return loop


class WorkerProcess:
    """A `python -m loader_workers`."""

    def __init__(
        self,
        address: str,
        worker_id: str,
        *,
        cache: Path,
        log: Path,
        drain_s: float = 5.0,
        options: Sequence[str] = (),
    ) -> None:
        self.worker_id = worker_id
        command = [sys.executable, "-m", "loader_workers", "--controller", address]
        command += ["--drain-s", str(drain_s)]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--cache", str(cache), "--worker-id", worker_id, *options],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return what the process ended with."""
        self.process.send_signal(number)
        return self.process.wait(PLENTY_S)


@dataclass
class ConsumedRun:
    """A controller that serves, the workers of its run, and the ranks that join it."""

    out: Path
    address: str
    drain_s: float
    """How long a worker that gets SIGTERM serves on until its lanes are served elsewhere."""

    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    sessions: list[trainer_client.Session] = field(default_factory=list)

    def add_worker(self, worker_id: str) -> None:
        """Start a worker; returns before it is ready."""
        self.workers[worker_id] = WorkerProcess(
            self.address,
            worker_id,
            cache=self.out / "cache",
            log=self.out / f"{worker_id}.log",
            drain_s=self.drain_s,
        )

    def end_worker(self, worker_id: str, number: signal.Signals) -> int:
        """End a worker with a signal; return its exit status."""
        return self.workers.pop(worker_id).end(number)

    def status(self) -> RunStatus:
        """Return the controller's word."""
        admin = AdminClient(self.address)
        try:
            return admin.status(timeout_s=PLENTY_S)
        finally:
            admin.close()

    def alive(self) -> dict[str, str]:
        """Return the endpoints of the workers that are enlisted."""
        return {each.worker_id: each.endpoint for each in self.status().workers if each.alive}

    def streaming(self) -> set[str]:
        """Return the endpoints that ranks have open streams from now."""
        return {
            stream.endpoint
            for session in list(self.sessions)
            if isinstance(session._feed, Feed)
            for stream in list(session._feed._streams)
            if stream._stream is not None
        }

    def deliveries(self) -> list[Delivery]:
        """Return all that ranks have logged."""
        return read_deliveries(self.out / RECEIVED, DOMAINS)

    def consume(
        self,
        world_size: int,
        *,
        until: int,
        resume: Callable[[int], State | None] = lambda rank: None,
        keep: Collection[int] = (),
        after_step: AfterStep = lambda step: None,
    ) -> dict[int, list[State]]:
        """Train as so many ranks, in step, on threads; return all ranks' states after `keep`.

        `resume` gives each rank's state to go on from; `after_step` is called by one rank after
        each step that all ranks have ended.
        """
        states: dict[int, list[State]] = {step: [{}] * world_size for step in keep}
        ended: list[int] = []
        together = threading.Barrier(world_size, lambda: after_step(ended[-1]))

        def train(rank: int) -> None:
            try:
                with trainer_client.connect(
                    self.address,
                    rank=rank,
                    world_size=world_size,
                    resume=resume(rank),
                    timeout_s=PLENTY_S,
                    delivery_log=self.out / RECEIVED,
                ) as session:
                    self.sessions.append(session)
                    for step in made_up_steps(session):
                        if step + 1 in states:
                            states[step + 1][rank] = session.state_dict()
                        ended.append(step)
                        together.wait(2 * PLENTY_S)
                        if step + 1 == until:
                            break
            except BaseException:
                together.abort()
                raise

        self.sessions.clear()
        with ThreadPoolExecutor(world_size) as ranks:
            for done in [ranks.submit(train, rank) for rank in range(world_size)]:
                done.result()
        self.sessions.clear()
        return states


def made_up_steps(session: trainer_client.Session) -> Iterator[int]:
    """Take every step's batches with losses that depend on the data alone; yield ended steps."""
    for batch in session.batches(micro_batch=4):
        losses = (batch.labels % 7 + batch.domain_ids[:, None]).float()
        session.record_losses(losses * batch.loss_mask, batch)
        if batch.last_of_step:
            session.end_step()
            yield batch.step


@contextmanager
def consumed_run(
    run_file: Path, *, num_workers: int = 1, drain_s: float = DRAIN_S
) -> Iterator[ConsumedRun]:
    """Serve a run with so many worker processes; at the end nothing of it is left."""
    torch.set_num_threads(1)
    config = load_run_file(run_file)
    with ExitStack() as stack:
        run = ConsumedRun(config.out, stack.enter_context(_controller(run_file)), drain_s)
        stack.callback(_end_all, run)
        for number in range(num_workers):
            run.add_worker(f"w{number}")
        yield run


@contextmanager
def _controller(run_file: Path) -> Iterator[str]:
    serving: list[str] = []
    up, stop = threading.Event(), asyncio.Event()

    def ready(address: str) -> None:
        serving.append(address)
        up.set()

    served = asyncio.run_coroutine_threadsafe(
        run_controller(load_run_file(run_file), on_ready=ready, stop=stop), _loop()
    )
    served.add_done_callback(lambda _: up.set())
    assert up.wait(PLENTY_S)
    if not serving:
        served.result(0)
    try:
        yield serving[0]
    finally:
        _loop().call_soon_threadsafe(stop.set)
        served.result(PLENTY_S)


def _end_all(run: ConsumedRun) -> None:
    for worker in run.workers.values():
        worker.process.kill()
        worker.process.wait(PLENTY_S)


Global = dict[tuple[int, int], tuple[str, int, str]]
"""Domain, tokens that count, and digest by step and slot."""


def global_batches(deliveries: Iterable[Delivery]) -> Global:
    """Return what was in each step and slot.

    Raises:
        AssertionError: two ranks received the same slot.
    """
    found: Global = {}
    for one in deliveries:
        assert (one.step, one.slot) not in found, f"slot {one.slot} of step {one.step} came twice"
        found[one.step, one.slot] = (one.domain, one.num_tokens, one.sha256)
    return found
