"""Small runs, and ranks and loader workers that a test moves by hand."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from controller import history as past
from controller.app import make_shadows
from controller.config import RunConfig, parse_run
from controller.hands import Hands, Pace
from controller.history import History
from controller.ledger import Ledger
from controller.loop import ControlLoop
from controller.metrics import Metrics
from controller.observation import StepObservation
from controller.policy.base import Policy, PolicyState, Statistic
from controller.policy_runner import PolicyRunner
from controller.prepare import Prepared, prepare
from controller.service import Service
from controller.shadows import Shadow
from controller.snapshots import Snapshots
from controller.state import RunState
from controller.threads import SingleThread
from controller.workers import Workers
from protos.dataset_index import DatasetIndex, ShardRef
from protos.slots import lanes_of, rank_slots
from protos.spec import RunSpec
from protos.types import (
    Cursors,
    Generation,
    JoinAnswer,
    JoinRequest,
    Plan,
    Rank,
    Resume,
    Step,
    StepReport,
    WorkerBeat,
)

DOMAINS = ("web", "code", "books")
STATIC = {"name": "static", "mixture": {"web": 0.5, "code": 0.3, "books": 0.2}}
ODM = {"name": "odm", "warmup_steps": 4}
ACODM = {"name": "acodm", "width": 8, "depth": 2, "batch_size": 4, "warmup_steps": 6}


def write_index(path: Path, *, num_samples: int = 100) -> DatasetIndex:
    """Write an index of one shard a domain; its shards do not exist."""
    index = DatasetIndex(
        ShardRef(
            domain=name,
            url=f"{name}.tar",
            num_bytes=10_000,
            num_samples=num_samples,
            text_bytes=9_000 * (position + 1),
            sha256="0" * 64,
        )
        for position, name in enumerate(DOMAINS)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(index.to_parquet())
    return index


def run_document(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a run file's content; `changes` replace whole keys, or parts of a section."""
    document: dict[str, Any] = {
        "run": "small",
        "seed": 7,
        "steps": 40,
        "out": str(folder / "out"),
        "address": "127.0.0.1:0",
        "data": {
            "index": str(folder / "index.parquet"),
            "vocab_size": 300,
            "eot_id": 0,
            "domains": {name: {"shards": [f"{name}.tar"]} for name in DOMAINS},
        },
        "batch": {
            "global_sequences": 8,
            "sequence_length": 16,
            "lanes": 4,
            "window_samples": 8,
            "interleave": 2,
        },
        "policy": STATIC,
        "control": {"report_grace_s": 0.3, "snapshot_every": 10, "worker_timeout_s": 5},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and key not in ("policy",):
            document[key] = {**document.get(key, {}), **value}
        else:
            document[key] = value
    return copy.deepcopy(document)


def small_run(folder: Path, **changes: Any) -> RunConfig:
    """Return a run whose index exists."""
    config = parse_run(run_document(folder, **changes), source="run.yaml")
    if not config.data.index.exists():
        write_index(config.data.index)
    return config


def join_request(rank: int, world_size: int, *, attempt: str = "a", **more: Any) -> JoinRequest:
    """Return a rank's request to take part."""
    more.setdefault("timeout_s", 5.0)
    return JoinRequest(
        rank=Rank(rank), world_size=world_size, attempt_id=f"{attempt}-{rank}", **more
    )


def resume_at(step: int, spec: RunSpec, *, cursors: Cursors | None = None) -> Resume:
    """Return what a checkpoint before `step` says."""
    return Resume(order_sha256=spec.order_sha256(), step=Step(step), cursors=cursors or {})


def places_after(step: int, spec: RunSpec) -> Cursors:
    """Return places that every lane could have after `step`: they only grow."""
    grown = np.arange(spec.num_domains, dtype=np.uint32)[:, None] + np.uint32(step + 1)
    places = np.concatenate([np.zeros_like(grown), np.zeros_like(grown), grown], axis=1)
    return {
        lane: places.copy()
        for lane in lanes_of(range(spec.global_sequences), slots_per_lane=spec.slots_per_lane)
    }


def make_report(
    spec: RunSpec,
    *,
    generation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    step: int = 0,
    counts: Sequence[int] | None = None,
    **more: Any,
) -> StepReport:
    """Return a report whose numbers depend on rank and step alone."""
    slots = rank_slots(rank, world_size=world_size, global_sequences=spec.global_sequences)
    even = np.bincount(np.arange(len(slots)) % spec.num_domains, minlength=spec.num_domains)
    sequences = np.asarray(even if counts is None else counts, dtype=np.int64)
    tokens = sequences * spec.sequence_length
    draw = np.random.default_rng((step + 1, rank))
    sketch = draw.normal(size=(spec.num_domains, 8))
    everything = places_after(step, spec)
    own = lanes_of(slots, slots_per_lane=spec.slots_per_lane)
    fields: dict[str, Any] = {
        "plan_version": 1,
        "sequences": sequences,
        "tokens": tokens,
        "loss_sum": tokens * (2 + draw.random(spec.num_domains)),
        "alignment_part": sketch @ sketch.T,
        "alignment_share": 1 / world_size,
        "weight_norms": (1.0 + draw.random(), 2.0),
        "update_norms": (0.1, 0.2),
        "step_s": 0.5,
        "data_wait_s": 0.1,
        "cursors": {lane: everything[lane] for lane in own},
    }
    fields.update(more)
    return StepReport(generation=Generation(generation), rank=Rank(rank), step=Step(step), **fields)


def make_beat(worker: str = "worker-0", **more: Any) -> WorkerBeat:
    """Return what a healthy worker says."""
    more.setdefault("endpoint", f"127.0.0.1:{7800 + len(worker)}")
    return WorkerBeat(worker_id=worker, **more)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """A controller without a network: service, loop and ledger, moved by a test."""

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        ledger: Ledger,
        history: History,
        policy: Policy,
        ledger_thread: SingleThread,
        now: Callable[[], float],
    ) -> None:
        self.config = config
        self.spec = prepared.spec
        self.ledger = ledger
        self.ledger_thread = ledger_thread
        self.clock = now
        self.workers = Workers(self.spec, expiry_s=config.control.worker_timeout_s, now=now)
        self.workers.quarantine(history.quarantines)
        self.workers.wanted = history.wanted_workers
        self.metrics = Metrics(self.spec.num_domains, history.totals, now=now)
        self.shadows = make_shadows(config, prepared)
        self.runner = PolicyRunner(policy, budget_s=config.guard.time_budget_s)
        hands = Hands(
            ledger=ledger,
            ledger_thread=ledger_thread,
            policy=self.runner,
            guard=prepared.guard,
            workers=self.workers,
            snapshots=Snapshots(config.snapshots_path, origin=config.origin),
            metrics=self.metrics,
            shadows=self.shadows,
        )
        pace = Pace(
            report_grace_s=config.control.report_grace_s,
            snapshot_every=config.control.snapshot_every,
            keep_steps=config.ledger.keep_steps,
        )
        self.state = RunState(self.spec, history, now=now)
        self.loop = ControlLoop(self.state, hands, steering=history.steering, pace=pace, now=now)
        self.service = Service(
            self.loop,
            workers=self.workers,
            metrics=self.metrics,
            policy=self.runner,
            shadows=self.shadows,
            blobs=prepared.blobs,
            bad_share=prepared.bad_share,
        )

    async def join_all(self, world_size: int, *, attempt: str = "a", **more: Any) -> JoinAnswer:
        """Enlist a worker, have all ranks join, and return rank 0's answer."""
        self.workers.beat(make_beat())
        requests = [join_request(r, world_size, attempt=attempt, **more) for r in range(world_size)]
        answers = await asyncio.gather(*(self.service.join(request) for request in requests))
        return answers[0]

    async def report_step(self, step: int, *, world_size: int = 1, **more: Any) -> None:
        """Have all ranks report a step, and let the loop do what follows from it."""
        more.setdefault("generation", self.state.generation)
        more.setdefault("plan_version", self.state.book.plan_at(Step(step)).version)
        for rank in range(world_size):
            report = make_report(self.spec, rank=rank, world_size=world_size, step=step, **more)
            await self.service.report(report)
        await self.settle()

    async def settle(self) -> None:
        """Let the loop close whatever is due."""
        while await self.loop.advance():
            pass

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans that the run has."""
        return self.state.book.plans


@contextmanager
def bench(
    config: RunConfig,
    *,
    policy: Policy | None = None,
    shadows: Sequence[Shadow] | None = None,
    now: Callable[[], float] | None = None,
) -> Iterator[Bench]:
    """Open a controller without a network on a run's ledger, for as long as the block lasts."""
    prepared = prepare(config)
    if shadows is not None:
        prepared = replace(prepared, shadows=tuple(shadows))
    thread = SingleThread("bench-ledger")
    with Ledger(config.ledger_path) as ledger:
        past.begin(ledger, prepared.spec, prepared.initial, config.model_dump(mode="json"))
        history = past.read_history(ledger, prepared.spec)
        made = Bench(
            config,
            prepared,
            ledger,
            history,
            policy or prepared.policy,
            thread,
            now or Clock(),
        )
        try:
            yield made
        finally:
            made.runner.close(1.0)
            made.shadows.close(5.0)
            thread.close(5.0)


def alternating(step: Step) -> Sequence[float]:
    return (0.6, 0.2, 0.2) if step % 2 else (0.1, 0.1, 0.8)


class ScriptedPolicy:
    """Proposes what it is told to, or fails; keeps what it observed."""

    def __init__(self, propose: Callable[[Step], Sequence[float]]) -> None:
        self._propose = propose
        self.observed: list[StepObservation] = []
        self.num_turns = 0

    @property
    def name(self) -> str:
        return "scripted"

    @property
    def phase(self) -> str:
        return "acting"

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.LOSS})

    def observe(self, observation: StepObservation) -> None:
        self.observed.append(observation)

    def propose(self, step: Step) -> Sequence[float]:
        self.num_turns += 1
        return self._propose(step)

    def state(self) -> PolicyState:
        return PolicyState(values={"num_turns": self.num_turns})

    def restore(self, state: PolicyState) -> None:
        self.num_turns = state.values["num_turns"]


async def beats(*items: WorkerBeat, until: asyncio.Event) -> AsyncIterator[WorkerBeat]:
    """Yield beats, then keep the stream open until the event is set."""
    for item in items:
        yield item
    await until.wait()
