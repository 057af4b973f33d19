"""A run as a trainer sees it: a controller that joins ranks, and workers that compose by the book.

What a worker sends is a function of step and slot, so that a test can say what must arrive.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from protos.documents import DocumentStarts
from protos.errors import Disagreement, HeadraceError, NotReady
from protos.security import Security
from protos.server import serving_controller, serving_data
from protos.slots import lanes_of, rank_slots
from protos.spec import ProbeSpec, RunSpec
from protos.status import RunStatus
from protos.types import (
    Beat,
    BlobChunk,
    Credit,
    Cursors,
    Generation,
    JoinAnswer,
    JoinRequest,
    Lane,
    LaneBatch,
    LaneEndpoint,
    LaneTable,
    OpenStream,
    PlanEvent,
    ReportAnswer,
    Step,
    StepBatch,
    StepReport,
    WorkerBeat,
)


def make_spec(
    *,
    num_steps: int = 6,
    lanes: int = 4,
    global_sequences: int = 12,
    sequence_length: int = 5,
    data_timeout_s: float = 20.0,
    num_domains: int = 3,
    vocab_size: int = 50_000,
    probe: ProbeSpec | None = None,
    packing: str = "concatenate",
) -> RunSpec:
    return RunSpec(
        run_id="fake",
        seed=1,
        domains=tuple(f"domain-{index}" for index in range(num_domains)),
        lanes=lanes,
        global_sequences=global_sequences,
        sequence_length=sequence_length,
        window_samples=8,
        interleave=2,
        num_steps=num_steps,
        lag=2,
        vocab_size=vocab_size,
        eot_id=0,
        text_field="text",
        index_sha256="",
        tokenizer_sha256="",
        degraded_after_s=1.0,
        data_timeout_s=data_timeout_s,
        probe=probe,
        packing=packing,
    )


def sequence(spec: RunSpec, step: int, slot: int) -> NDArray[np.uint16]:
    """Return the tokens of a slot."""
    first = (step * 1000 + slot * 10) % (spec.vocab_size - spec.sequence_length)
    return (first + np.arange(spec.sequence_length + 1)).astype(np.uint16)


def domain_of(spec: RunSpec, step: int, slot: int) -> int:
    return (step + slot) % spec.num_domains


def num_tokens_of(spec: RunSpec, step: int, slot: int) -> int:
    return spec.sequence_length + 1 - (slot + step) % 3


def starts_of(spec: RunSpec, step: int, slot: int) -> list[int]:
    """Return where documents begin in a slot."""
    last = num_tokens_of(spec, step, slot)
    return [place for place in range(1, last) if (step + slot + place) % 3 == 0]


def cursor_before(spec: RunSpec, lane: int, step: int) -> NDArray[np.uint32]:
    """Return a place that names its lane and step, so that a wrong one is seen."""
    places = np.zeros((spec.num_domains, 3), np.uint32)
    places[:, 1] = lane
    places[:, 2] = step
    return places


def lane_batch(
    spec: RunSpec, step: int, lane: int, wanted: range, *, documents: bool = False
) -> LaneBatch:
    per_lane = spec.slots_per_lane
    first = max(lane * per_lane, wanted.start)
    slots = range(first, min((lane + 1) * per_lane, wanted.stop))
    return LaneBatch(
        lane=Lane(lane),
        first_slot=first,
        tokens=np.stack([sequence(spec, step, slot) for slot in slots]),
        domain_ids=np.array([domain_of(spec, step, slot) for slot in slots], np.uint16),
        num_tokens=np.array([num_tokens_of(spec, step, slot) for slot in slots], np.uint32),
        places=np.array([(0, step, slot) for slot in slots], np.uint32),
        cursor_after=cursor_before(spec, lane, step + 1),
        documents=DocumentStarts.of(
            [np.array(starts_of(spec, step, slot), np.int64) for slot in slots]
        )
        if documents
        else None,
    )


def join_steps(batches: Sequence[StepBatch]) -> StepBatch:
    """Put consecutive steps into one message."""
    if len(batches) == 1:
        return batches[0]
    lanes = []
    for parts in zip(*(batch.lanes for batch in batches), strict=True):
        documents = [part.documents for part in parts if part.documents is not None]
        lanes.append(
            LaneBatch(
                lane=parts[0].lane,
                first_slot=parts[0].first_slot,
                tokens=np.concatenate([part.tokens for part in parts]),
                domain_ids=np.concatenate([part.domain_ids for part in parts]),
                num_tokens=np.concatenate([part.num_tokens for part in parts]),
                places=np.concatenate([part.places for part in parts]),
                cursor_after=parts[-1].cursor_after,
                earlier_cursors=np.stack([part.cursor_after for part in parts[:-1]]),
                documents=DocumentStarts.join(documents) if documents else None,
            )
        )
    first = batches[0]
    return StepBatch(
        step=first.step,
        plan_version=first.plan_version,
        degraded=first.degraded,
        lanes=tuple(lanes),
        num_steps=len(batches),
    )


class FakeWorker:
    """Composes by the book; can be told to break, to hang or to hold a step back."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self.openings: list[OpenStream] = []
        self.credits: list[Credit] = []
        self.break_before: set[int] = set()
        """Steps before which a stream breaks, once each."""

        self.fail_with: HeadraceError | None = None
        self.held_step = 1 << 30
        self.most_together = 1
        """Steps that it puts into one message, if the rank lets it."""

        self.release = threading.Event()
        """Set: the held step may go out."""

        self.mangle: Callable[[StepBatch], StepBatch] = lambda batch: batch
        self.always_documents = False
        """Send where documents begin even to those that do not ask."""

        self.most_ahead = 0

    def stream_batches(self, opening: OpenStream, credits: Iterator[Credit]) -> Iterator[StepBatch]:
        self.openings.append(opening)
        for lane, cursor in opening.cursors.items():
            expected = cursor_before(self._spec, lane, opening.cursor_steps[lane])
            if not np.array_equal(cursor, expected):
                raise Disagreement(f"lane {lane} does not stand at step {opening.from_step}")
        step, left = int(opening.from_step), opening.credits
        while True:
            while left == 0:
                credit = next(credits, None)
                if credit is None:
                    return
                self.credits.append(credit)
                left += credit.steps
            if self.fail_with is not None:
                raise self.fail_with
            if step >= self.held_step and not self.release.is_set():
                credit = next(credits, None)
                if credit is None:
                    return
                self.credits.append(credit)
                left += credit.steps
                continue
            if step in self.break_before:
                self.break_before.remove(step)
                raise NotReady("the worker was told to break here")
            count = self._num_together(opening, step, left)
            yield self.mangle(join_steps([self._compose(opening, step + n) for n in range(count)]))
            step, left = step + count, left - count

    def _num_together(self, opening: OpenStream, step: int, credits: int) -> int:
        """Return how many steps go into one message: never what a test wants to happen between."""
        ends = [step + min(opening.most_steps, self.most_together, credits)]
        ends += [end for end in (*self.break_before, self.held_step) if end > step]
        return min(ends) - step

    def _compose(self, opening: OpenStream, step: int) -> StepBatch:
        wanted = range(opening.first_slot, opening.end_slot)
        return StepBatch(
            step=Step(step),
            plan_version=step // 2,
            degraded=False,
            lanes=tuple(
                lane_batch(
                    self._spec,
                    step,
                    lane,
                    wanted,
                    documents=opening.documents or self.always_documents,
                )
                for lane in sorted(opening.cursors)
            ),
        )


class FakeController:
    """Joins every rank at once; says which worker serves which lane; keeps the reports."""

    def __init__(self, spec: RunSpec, endpoints: Sequence[str]) -> None:
        self.spec = spec
        self.endpoints = list(endpoints)
        """One a lane."""

        self.lanes_version = 1
        self.fail_locates: list[HeadraceError] = []
        self.unreachable: list[str] = []
        """What ranks said when they asked who serves their lanes."""

        self.requests: list[JoinRequest] = []
        self.reports: list[StepReport] = []
        self.reported = threading.Condition()
        self.fail_reports_with: HeadraceError | None = None
        self.fail_joins: list[HeadraceError] = []
        self.hang_reports = False
        self.generation = 1
        self.first_step = 0
        self.cursor_step: int | None = None

    async def join(self, request: JoinRequest) -> JoinAnswer:
        self.requests.append(request)
        if self.fail_joins:
            raise self.fail_joins.pop(0)
        first_step = self.first_step
        if request.resume is not None:
            if request.resume.order_sha256 != self.spec.order_sha256():
                raise Disagreement("the checkpoint is of another order of the data")
            first_step = request.resume.step
        slots = rank_slots(
            request.rank,
            world_size=request.world_size,
            global_sequences=self.spec.global_sequences,
        )
        lanes = lanes_of(slots, slots_per_lane=self.spec.slots_per_lane)
        stands = first_step if self.cursor_step is None else self.cursor_step
        cursors: Cursors = {lane: cursor_before(self.spec, lane, stands) for lane in lanes}
        if request.resume is not None:
            cursors |= {
                lane: cursor for lane, cursor in request.resume.cursors.items() if lane in lanes
            }
        return JoinAnswer(
            generation=Generation(self.generation),
            spec=self.spec,
            first_step=Step(first_step),
            endpoints=self._located(),
            cursors=cursors,
            cursor_steps=dict.fromkeys(cursors, Step(stands)),
            lanes_version=self.lanes_version,
        )

    def _located(self) -> tuple[LaneEndpoint, ...]:
        return tuple(
            LaneEndpoint(lane=Lane(lane), endpoint=endpoint, worker_id=endpoint)
            for lane, endpoint in enumerate(self.endpoints)
        )

    async def locate(self, generation: Generation, *, unreachable: str) -> LaneTable:
        self.unreachable.append(unreachable)
        if self.fail_locates:
            raise self.fail_locates.pop(0)
        return LaneTable(version=self.lanes_version, endpoints=self._located())

    def move_lanes(self, endpoints: Sequence[str]) -> None:
        """Have lanes served elsewhere from now on; ranks hear of it with their next report."""
        self.endpoints = list(endpoints)
        self.lanes_version += 1

    async def report(self, report: StepReport) -> ReportAnswer:
        if self.hang_reports:
            await asyncio.Event().wait()
        if self.fail_reports_with is not None:
            raise self.fail_reports_with
        with self.reported:
            self.reports.append(report)
            self.reported.notify_all()
        return ReportAnswer(
            plan_version=0,
            sealed_through=report.step + 2,
            counted=True,
            lanes_version=self.lanes_version,
        )

    async def watch_plans(
        self, worker_id: str, *, answers: bool = False
    ) -> AsyncIterator[PlanEvent]:
        no_events: tuple[PlanEvent, ...] = ()
        for event in no_events:
            yield event

    async def enlist(
        self, beats: AsyncIterator[WorkerBeat]
    ) -> AsyncIterator[RunSpec | BlobChunk | Beat]:
        yield self.spec

    async def status(self) -> RunStatus:
        raise NotImplementedError

    async def set_mixture(self, shares: Mapping[str, float]) -> int:
        raise NotImplementedError

    async def freeze(self) -> None: ...

    async def resume(self) -> None: ...

    async def snapshot_policy(self) -> str:
        raise NotImplementedError

    async def drain(self) -> None: ...

    async def scale(self, workers: int) -> None: ...


@contextmanager
def serving(controller: FakeController, security: Security | None = None) -> Iterator[str]:
    """Serve the controller from a thread; yield its address."""
    bound: list[str] = []
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    stop = asyncio.Event()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with serving_controller(
            controller, controller, address="127.0.0.1:0", security=security, drain_s=0.1
        ) as address:
            bound.append(address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield bound[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)


class FakeRun:
    """A controller and some workers that share the lanes evenly."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        num_workers: int = 2,
        security: Security | None = None,
        controllers_own: Security | None = None,
    ) -> None:
        """Serve with `security`; the controller with another one if it has its own."""
        self.spec = spec
        self.security = security
        self._controllers_own = controllers_own or security
        self.workers = [FakeWorker(spec) for _ in range(num_workers)]
        self.controller = FakeController(spec, [])
        self.address = ""
        self.endpoints: list[str] = []

    @contextmanager
    def serving(self) -> Iterator[FakeRun]:
        with ExitStack() as stack:
            self.endpoints = [
                stack.enter_context(
                    serving_data(worker, address="127.0.0.1:0", security=self.security, drain_s=0.1)
                )
                for worker in self.workers
            ]
            lanes = self.spec.lanes
            self.controller.endpoints = [
                self.endpoints[lane * len(self.endpoints) // lanes] for lane in range(lanes)
            ]
            self.address = stack.enter_context(serving(self.controller, self._controllers_own))
            yield self


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Wait for something that another thread does, which has nothing to wait on.

    Raises:
        TimeoutError: it did not come about.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come about")
        pause.wait(0.005)
