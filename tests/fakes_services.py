"""Both services as scripted: no run behind them, so that a test sees the wire alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager

from protos.errors import Disagreement, StaleGeneration, UnknownDomain
from protos.limits import CONTROLLER, Limits
from protos.security import Security
from protos.server import serving_controller
from protos.spec import RunSpec
from protos.status import RunStatus
from protos.types import (
    Beat,
    BlobChunk,
    Credit,
    Generation,
    JoinAnswer,
    JoinRequest,
    LaneTable,
    OpenStream,
    PlanEvent,
    Rank,
    ReportAnswer,
    StepBatch,
    StepReport,
    WorkerBeat,
)
from tests.property.test_codec import ANSWER, ENDPOINT, PLAN, SPEC, STATUS, _batch

TABLE = LaneTable(version=3, endpoints=(ENDPOINT,))


class ScriptedController:
    """Answers as told; keeps what it was asked."""

    def __init__(self) -> None:
        self.beats: list[WorkerBeat] = []
        self.reports: list[StepReport] = []
        self.watchers_gone = threading.Event()
        self.fail_with: Exception | None = None
        self.unreachable: list[str] = []
        self.wanted_workers = 0

    async def join(self, request: JoinRequest) -> JoinAnswer:
        if request.rank == Rank(0):
            raise Disagreement("rank 0 says 8, rank 1 says 4")
        return ANSWER

    async def locate(self, generation: Generation, *, unreachable: str) -> LaneTable:
        self.unreachable.append(unreachable)
        return TABLE

    async def report(self, report: StepReport) -> ReportAnswer:
        if self.fail_with is not None:
            raise self.fail_with
        self.reports.append(report)
        return ReportAnswer(plan_version=report.plan_version, sealed_through=5, counted=True)

    async def watch_plans(
        self, worker_id: str, *, answers: bool = False
    ) -> AsyncIterator[PlanEvent]:
        try:
            yield PlanEvent(generation=Generation(1), plans=(PLAN,), sealed_through=8, reset=True)
            await asyncio.Event().wait()
        finally:
            self.watchers_gone.set()

    async def enlist(
        self, beats: AsyncIterator[WorkerBeat]
    ) -> AsyncIterator[RunSpec | BlobChunk | Beat]:
        yield SPEC
        async for beat in beats:
            self.beats.append(beat)
            yield Beat()

    async def status(self) -> RunStatus:
        return STATUS

    async def set_mixture(self, shares: Mapping[str, float]) -> int:
        raise UnknownDomain(f"no domain {next(iter(shares), '')!r}")

    async def freeze(self) -> None: ...

    async def resume(self) -> None: ...

    async def snapshot_policy(self) -> str:
        return "/snapshots/7"

    async def drain(self) -> None: ...

    async def scale(self, workers: int) -> None:
        self.wanted_workers = workers


@contextmanager
def serving(
    controller: ScriptedController,
    address: str = "127.0.0.1:0",
    *,
    security: Security | None = None,
    limits: Limits = CONTROLLER,
) -> Iterator[str]:
    """Serve the controller from a thread; yield its address."""
    bound: list[str] = []
    failed: list[Exception] = []
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        try:
            async with serving_controller(
                controller, controller, address=address, security=security, limits=limits
            ) as where:
                bound.append(where)
                ready.set()
                await stop.wait()
        except Exception as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        if failed:
            raise failed[0]
        yield bound[0]
    finally:
        if not failed:
            loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()


class ScriptedWorker:
    """Sends one batch for every credit."""

    def __init__(self) -> None:
        self.rank_left = threading.Event()

    def stream_batches(self, opening: OpenStream, credits: Iterator[Credit]) -> Iterator[StepBatch]:
        if opening.generation > 5:
            raise StaleGeneration("generation 6 is not known here")
        try:
            for _ in range(opening.credits):
                yield _batch("<u4")
            for credit in credits:
                for _ in range(credit.steps):
                    yield _batch("<u4")
        finally:  # the credits end, or the generator is closed while it waits to be asked again
            self.rank_left.set()
