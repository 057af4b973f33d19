"""The services as Protocols in our own types; `protos` alone puts them on a wire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Protocol

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
    ReportAnswer,
    StepBatch,
    StepReport,
    WorkerBeat,
)


class ControlService(Protocol):
    """What the controller does for ranks and loader workers. All methods run on its event loop."""

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """Answer when all ranks of the generation are there; idempotent by (rank, attempt_id).

        Raises:
            Disagreement: ranks, or a rank and the run, differ in a setting.
            WrongRun: the rank wants another run.
            JoinTimeout: not all ranks came within `request.timeout_s`.
            NotReady: no loader worker is enlisted yet within `request.timeout_s`.
        """

    async def locate(self, generation: Generation, *, unreachable: str) -> LaneTable:
        """Say who serves each lane now.

        `unreachable` is the endpoint whose stream broke, if that is why the rank asks, else empty.
        """

    async def report(self, report: StepReport) -> ReportAnswer:
        """Record what a rank saw; idempotent by (generation, rank, step).

        Raises:
            StaleGeneration: the rank's membership has ended.
            InvalidMessage: a number is not finite, a shape is wrong, a step lies in the future.
        """

    def watch_plans(self, worker_id: str, *, answers: bool = False) -> AsyncIterator[PlanEvent]:
        """Yield the plans from the generation's first step on, then every seal, then beats.

        A worker that `answers` is asked first how far it went alone; see `PlanEvent.asked`.
        """

    def enlist(self, beats: AsyncIterator[WorkerBeat]) -> AsyncIterator[RunSpec | BlobChunk | Beat]:
        """Take a worker in: answer with the run's settings, its index and tokenizer, then beats."""


class AdminService(Protocol):
    """What an operator may do. All methods run on the controller's event loop."""

    async def status(self) -> RunStatus:
        """Say how the run stands."""

    async def set_mixture(self, shares: Mapping[str, float]) -> int:
        """Override the policy until `resume`; return the first step that obeys.

        Raises:
            UnknownDomain: a name is not a domain of the run.
            InvalidMessage: a share is negative or not finite, or all are 0.
        """

    async def freeze(self) -> None:
        """Hold the mixture in force until `resume`."""

    async def resume(self) -> None:
        """Give the decision back to the policy."""

    async def snapshot_policy(self) -> str:
        """Save the policy's state; return its path."""

    async def drain(self) -> None:
        """Decide no more; tell the workers that the run is over."""

    async def scale(self, workers: int) -> None:
        """Want so many loader workers from now on; whoever manages them obeys.

        Raises:
            InvalidMessage: it is less than 1.
            ConfigError: nobody manages the workers that are there.
        """


class DataService(Protocol):
    """What a loader worker does for ranks."""

    def stream_batches(self, opening: OpenStream, credits: Iterator[Credit]) -> Iterator[StepBatch]:
        """Yield the batches of some lanes, step by step, as far as the credits go.

        Runs on a thread of its own; `credits` blocks until the rank says something and ends when
        the rank goes away. If that happens between two batches the generator is closed: what
        must be undone belongs in a `finally`.

        Raises:
            WrongRun: the rank belongs to another run.
            StaleGeneration: a newer generation has begun.
            InvalidMessage: lanes, slots or cursors are out of bounds.
            NotReady: the worker has not heard of the generation yet.
        """
