"""What the controller does for ranks, loader workers and operators."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from controller.bad_share import BadShare
from controller.blobs import Blobs
from controller.guard import GuardResult
from controller.joining import Joining
from controller.ledger_schema import event_entry, quarantine_entry, workers_entry
from controller.loop import ControlLoop
from controller.metrics import Metrics
from controller.policy_runner import PolicyRunner
from controller.scrape import families
from controller.shadows import Shadows
from controller.telling import BEAT_S, Teller
from controller.workers import Workers
from protos.errors import (
    ConfigError,
    HeadraceError,
    InvalidMessage,
    NotReady,
    StaleGeneration,
    UnknownDomain,
)
from protos.failpoints import Failpoint
from protos.spec import RunSpec
from protos.status import RunStatus
from protos.types import (
    Beat,
    BlobChunk,
    Generation,
    JoinAnswer,
    JoinRequest,
    LaneTable,
    Mixture,
    PlanEvent,
    ReportAnswer,
    StepReport,
    WorkerBeat,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

FIRST_BEAT_TIMEOUT_S = 10.0
"""How long a worker that opens a stream may take to say who it is."""

_REPLY = Failpoint("reply.report", "after a report is taken in, before it is answered")
_JOIN_REPLY = Failpoint("reply.join", "after a generation has begun, before a rank hears of it")
_ADMIN_REPLY = Failpoint("reply.admin", "after an order is carried out, before it is answered")

_STOPS = "the controller stops; join again when it is back"


class Service:
    """Implements `protos.services.ControlService` and `AdminService`, on one event loop."""

    def __init__(
        self,
        loop: ControlLoop,
        *,
        workers: Workers,
        metrics: Metrics,
        policy: PolicyRunner,
        shadows: Shadows,
        blobs: Blobs,
        bad_share: BadShare,
    ) -> None:
        self._loop = loop
        self._workers = workers
        self._metrics = metrics
        self._policy = policy
        self._shadows = shadows
        self._blobs = blobs
        self._bad_share = bad_share
        self._joining = Joining(loop, workers)
        self._streams: dict[str, object] = {}
        self._working: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._teller = Teller(loop, workers, stopping=self._stopping)
        self._failure: HeadraceError | None = bad_share.add(workers.quarantines)

    def stop(self) -> None:
        """End all streams and waits, so that the server can stop."""
        self._stopping.set()
        self._loop.changed.notify()
        self._joining.close(_STOPS)

    @property
    def is_deciding(self) -> bool:
        """Whether decisions can be made: the ledger can be written."""
        return not self._loop.is_silent

    # For ranks.

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """See `ControlService.join`."""
        self._check_going_on()
        if self._stopping.is_set():
            raise NotReady(_STOPS)
        answer = await self._joining.join(request)
        _JOIN_REPLY.hit()
        return answer

    async def locate(self, generation: Generation, *, unreachable: str = "") -> LaneTable:
        """See `ControlService.locate`."""
        self._check_going_on()
        current = self._loop.state.generation
        if generation != current:
            raise StaleGeneration(
                f"lanes of generation {generation} are asked for, but generation {current} has "
                "begun since; join again"
            )
        self._check_step_will_come()
        for name in self._workers.unreachable(unreachable) if unreachable else ():
            self._loop.worker_lost(name, "its stream ended, and a rank cannot reach it")
        endpoints = self._workers.endpoints()
        if not endpoints:
            raise NotReady("no loader worker serves all lanes now; ask again")
        return LaneTable(version=self._workers.lanes_version, endpoints=endpoints)

    async def report(self, report: StepReport) -> ReportAnswer:
        """See `ControlService.report`."""
        self._check_going_on()
        answer = self._loop.add_report(report)
        _REPLY.hit()
        return replace(answer, lanes_version=self._workers.lanes_version)

    # For loader workers.

    def watch_plans(self, worker_id: str, *, answers: bool = False) -> AsyncIterator[PlanEvent]:
        """See `ControlService.watch_plans`."""
        return self._teller.watch(worker_id, answers=answers)

    async def enlist(
        self, beats: AsyncIterator[WorkerBeat]
    ) -> AsyncIterator[RunSpec | BlobChunk | Beat]:
        """See `ControlService.enlist`."""
        self._check_going_on()
        try:
            async with asyncio.timeout(FIRST_BEAT_TIMEOUT_S):
                first = await anext(beats)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidMessage(
                f"a worker opened a stream but did not say who it is in {FIRST_BEAT_TIMEOUT_S:g} s"
            ) from None
        self._take(first)
        stream = self._streams[first.worker_id] = object()
        reading = asyncio.create_task(self._read(beats, first.worker_id))
        try:
            yield self._loop.state.spec
            for chunk in self._blobs.chunks():
                yield chunk
            while not self._stopping.is_set() and not reading.done():
                self._check_going_on()
                yield Beat(drain=self._loop.is_drained)
                await self._pause(reading)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            # Before anything is waited for: a call that ends is sometimes cancelled twice.
            self._leave(first.worker_id, stream)
            # The error of a stream that broke is of no use to anybody.
            await asyncio.gather(reading, return_exceptions=True)

    async def _pause(self, reading: asyncio.Task[None]) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait(
                {reading, stopping}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stopping.cancel()

    async def _read(self, beats: AsyncIterator[WorkerBeat], worker_id: str) -> None:
        async for beat in beats:
            if beat.worker_id != worker_id:
                raise InvalidMessage(
                    f"the stream of worker {worker_id} holds a beat of worker {beat.worker_id}"
                )
            self._take(beat)

    def _take(self, beat: WorkerBeat) -> None:
        degraded, were_served = self._workers.num_degraded, self._workers.serve_all_lanes
        had_answered = self._workers.has_answered(beat.worker_id)
        self._loop.settling.check(beat)
        is_new = self._workers.beat(beat)
        if not had_answered and self._workers.has_answered(beat.worker_id):
            self._loop.stir()
            self._loop.changed.notify()
        fresh = self._workers.quarantine(beat.quarantines)
        self._loop.note(*(quarantine_entry(item, worker_id=beat.worker_id) for item in fresh))
        if fresh:
            self._failure = self._failure or self._bad_share.add(fresh)
        if self._workers.num_degraded > degraded:
            self._loop.note(
                event_entry(
                    "degraded",
                    step=beat.composed_through,
                    worker=beat.worker_id,
                    steps=self._workers.num_degraded - degraded,
                )
            )
        if is_new:
            self._loop.note(
                event_entry("worker enlisted", worker=beat.worker_id, endpoint=beat.endpoint)
            )
        if is_new or self._workers.serve_all_lanes != were_served:
            self._joining.workers_changed()
        if beat.needed_step >= 0:
            self._loop.stir()

    def _leave(self, worker_id: str, stream: object) -> None:
        # A worker that has come back over a newer stream is not lost with the old one.
        if self._streams.get(worker_id) is not stream:
            return
        del self._streams[worker_id]
        if self._workers.stream_ended(worker_id) and not self._stopping.is_set():
            self._loop.note(event_entry("worker left", worker=worker_id))

    def _check_step_will_come(self) -> None:
        if not self._loop.is_drained:
            return
        through = self._loop.state.sealed_through
        if self._workers.needed_beyond(through, self._loop.state.generation) is not None:
            raise ConfigError(
                f"the controller was drained: step {through} was the last one that was decided, "
                "no later one will come; to train on, start the controller again and resume"
            )

    def _check_going_on(self) -> None:
        if self._failure is not None:
            raise self._failure

    # For operators.

    async def figures(self) -> list[Any]:
        """Return what Prometheus gets; see `controller.scrape`."""
        return families(await self.status(), self._metrics)

    async def status(self) -> RunStatus:
        """See `AdminService.status`."""
        state, totals, spec = self._loop.state, self._metrics.totals, self._loop.state.spec
        membership, steering = state.membership, self._loop.steering
        running = "running" if membership is not None else "waiting"
        return RunStatus(
            run_id=spec.run_id,
            policy=self._policy.name,
            policy_phase=self._policy.phase,
            phase="drained" if self._loop.is_drained else running,
            domains=spec.domains,
            mixture=state.newest_plan.mixture,
            plan_version=state.newest_plan.version,
            observed_step=state.observed_through,
            sealed_through=state.sealed_through,
            num_steps=spec.num_steps,
            generation=state.generation,
            world_size=membership.world_size if membership is not None else 0,
            loss=tuple(self._metrics.loss.tolist()),
            tokens=totals.tokens,
            tokens_per_s=self._metrics.tokens_per_s,
            data_wait_share=self._metrics.data_wait_share,
            data_wait_s=totals.data_wait_s,
            step_s=totals.step_s,
            degraded_steps=max(totals.degraded_steps, self._workers.num_degraded),
            missing_reports=totals.missing_reports,
            held_decisions=totals.held_decisions,
            decision_ms_p50=self._metrics.decision_ms(50),
            decision_ms_p99=self._metrics.decision_ms(99),
            frozen=steering.frozen or steering.override is not None,
            wanted_workers=self._workers.wanted,
            lanes_moved=self._workers.num_lanes_moved,
            quarantines=(*self._bad_share.at_index, *self._workers.quarantines),
            workers=self._workers.statuses(),
            ledger_fault=self._loop.scribe.fault,
            shadows=self._shadows.statuses,
        )

    def on_written(self, call: Callable[[], None]) -> None:
        """Have `call` run on this loop whenever the ledger was written, or could not be."""
        self._loop.scribe.on_written(call)

    async def newest_reports(self) -> tuple[StepReport, ...]:
        """Return what the ranks said of the newest step."""
        return self._metrics.newest_reports

    async def preview(self, shares: Mapping[str, float]) -> GuardResult:
        """Say what the guard would make of a mixture, were it the policy's proposal."""
        return self._loop.preview(self._mixture_of(shares))

    async def set_mixture(self, shares: Mapping[str, float]) -> int:
        """See `AdminService.set_mixture`; a domain that is left out gets 0."""
        mixture = self._mixture_of(shares)
        return await self._to_the_end(self._loop.steer(override=mixture, frozen=False))

    def _mixture_of(self, shares: Mapping[str, float]) -> Mixture:
        domains = self._loop.state.spec.domains
        for name in shares:
            if name not in domains:
                raise UnknownDomain(
                    f"the mixture names domain {name!r}; the run has {', '.join(domains)}"
                )
        try:
            return Mixture.from_shares([shares.get(name, 0.0) for name in domains])
        except ValueError as error:
            raise InvalidMessage(str(error)) from None

    async def freeze(self) -> None:
        """See `AdminService.freeze`."""
        override = self._loop.steering.override
        await self._to_the_end(self._loop.steer(override=override, frozen=True))

    async def resume(self) -> None:
        """See `AdminService.resume`."""
        await self._to_the_end(self._loop.steer(override=None, frozen=False))

    async def snapshot_policy(self) -> str:
        """See `AdminService.snapshot_policy`."""
        return await self._to_the_end(self._loop.snapshot())

    async def drain(self) -> None:
        """See `AdminService.drain`."""
        await self._to_the_end(self._loop.drain())

    async def scale(self, workers: int) -> None:
        """See `AdminService.scale`."""
        if workers < 1:
            raise InvalidMessage(f"a run needs at least 1 loader worker, got {workers}")
        if not self._workers.are_managed:
            raise ConfigError(
                "nobody manages the loader workers of this run: start one more with `python -m "
                "loader_workers`, or end one with Ctrl-C, which hands its lanes over first"
            )
        if workers == self._workers.wanted:
            return
        self._loop.note(workers_entry(workers))
        await self._to_the_end(self._loop.flush())
        self._workers.wanted = workers

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` even if whoever asked waits no longer.

        A call ends with its deadline; a decision that ended there would be in the ledger and
        nowhere else.
        """
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._worked)
        result = await asyncio.shield(task)
        _ADMIN_REPLY.hit()
        return result

    def _worked(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("what an operator asked for failed: %s", error)
