"""The values that controller, loader workers and trainers exchange, checked at birth.

Those of plans are in `protos.plans` and those of batches in `protos.batches`; all are found here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.batches import Credit, LaneBatch, OpenStream, StepBatch
from protos.plans import (
    SHARE_ONE,
    AloneSteps,
    Cursors,
    Generation,
    Lane,
    Mixture,
    Places,
    Plan,
    PlanEvent,
    Rank,
    Step,
)
from protos.spec import RunSpec

__all__ = [
    "AloneSteps",
    "Beat",
    "BlobChunk",
    "Credit",
    "Cursors",
    "EnlistEvent",
    "Generation",
    "JoinAnswer",
    "JoinRequest",
    "Lane",
    "LaneBatch",
    "LaneEndpoint",
    "LaneTable",
    "Mixture",
    "OpenStream",
    "Places",
    "Plan",
    "PlanEvent",
    "Quarantine",
    "Rank",
    "ReportAnswer",
    "Resume",
    "SHARE_ONE",
    "Step",
    "StepBatch",
    "StepReport",
    "WorkerBeat",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneEndpoint:
    """Which loader worker serves a lane."""

    lane: Lane
    endpoint: str
    worker_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """Something left out of the data, and why."""

    domain: str
    shard: str
    sample: int
    """Position in the shard; -1: the whole shard."""

    reason: str


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Resume:
    """What a trainer checkpoint knows of the data."""

    order_sha256: str
    step: Step
    """The next step to train."""

    cursors: Cursors
    """Each lane's place before `step`; may hold a part of the lanes only."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class JoinRequest:
    """A rank asks to take part."""

    rank: Rank
    world_size: int
    attempt_id: str
    """One for each process that joins, so that a retry is told from a restart."""

    run_id: str = ""
    """Empty: whichever run the controller has."""

    global_sequences: int = 0
    """What the trainer expects; 0: whatever the run says."""

    sequence_length: int = 0
    resume: Resume | None = None
    timeout_s: float = 60.0
    """How long to wait for the other ranks."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must be in 0..world_size-1, got rank {self.rank} of {self.world_size}"
            )


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class JoinAnswer:
    """What a rank needs to start."""

    generation: Generation
    spec: RunSpec
    first_step: Step
    endpoints: tuple[LaneEndpoint, ...]
    """All lanes, in order."""

    cursors: Cursors
    """Newest known place of each lane that this rank consumes, at or before `first_step`."""

    cursor_steps: Mapping[Lane, Step]
    """The step before which each of `cursors` stands."""

    lanes_version: int = 0
    """Of `endpoints`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneTable:
    """Who serves each lane."""

    version: int
    """Grows whenever a lane is served elsewhere."""

    endpoints: tuple[LaneEndpoint, ...]
    """All lanes, in order; empty: some lane has nobody."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepReport:
    """What a rank says of one optimizer step. Arrays are in the order of the run's domains."""

    generation: Generation
    rank: Rank
    step: Step
    plan_version: int
    sequences: NDArray[np.int64]
    """[domains]"""

    tokens: NDArray[np.int64]
    """[domains]: labels that counted in the loss."""

    loss_sum: NDArray[np.float64]
    """[domains]: nats, summed over those tokens."""

    alignment_part: NDArray[np.float64] | None = None
    """[domains, domains]: this rank's part of the inner products of the summed gradients."""

    alignment_share: float = 0.0
    """Share of the sketch's coordinates that the part covers."""

    weight_norms: tuple[float, ...] = ()
    update_norms: tuple[float, ...] = ()
    validation_loss: NDArray[np.float64] | None = None
    """[domains]: nats a token on held-out documents, after the step; None: not evaluated."""

    excess_sum: NDArray[np.float64] | None = None
    """[domains]: what the tokens' losses exceed a reference's by, in nats; None: no reference."""

    part_square_norms: NDArray[np.float64] | None = None
    """[domains]: squared norms of the sequences' gradients, summed; None: not measured."""

    num_parts: NDArray[np.int64] | None = None
    """[domains]: how many sequences these are."""

    step_s: float = 0.0
    data_wait_s: float = 0.0
    probe_s: float = 0.0
    degraded: bool = False
    cursors: Cursors = dataclasses.field(default_factory=dict)
    """This rank's lanes, after the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportAnswer:
    """What the controller says to a report."""

    plan_version: int
    sealed_through: int
    counted: bool
    """False: the report was known already, or came too late for its decision."""

    lanes_version: int = 0
    """A newer one than the rank knows says that lanes are served elsewhere."""

    epoch: int = 0
    """The controller's number, which grows with each that opens the ledger; 0: it has none."""

    observed_through: int = -1
    """What was decided upon the steps up to this one is in the ledger."""

    ledger_head: str = ""
    """Of its last row, `ROW:HASH`: what is kept of it elsewhere tells whether the ledger was rolled
    back. Empty: not told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerBeat:
    """What a loader worker says of itself, about once a second."""

    worker_id: str
    endpoint: str
    run_id: str = ""
    capacity_lanes: int = 0
    """0: as many as needed."""

    pid: int = 0
    generation: Generation = Generation(0)
    needed_step: int = -1
    """A rank waits for this step and it is not sealed; -1: none."""

    composed_through: int = -1
    """Last step composed in `generation`; -1: none."""

    degraded_steps: int = 0
    cache_bytes: int = 0
    stall_s: float = 0.0
    """Time in which a rank waited for this worker, in all."""

    sequences_served: int = 0
    quarantines: tuple[Quarantine, ...] = ()
    leaving: bool = False
    """It wants to go: its lanes shall be given to others."""

    managed: bool = False
    """It is started and ended by whoever obeys `AdminService.scale`."""

    starting: bool = False
    """It cannot serve yet: it shall be given no lanes."""

    heard_epoch: int = 0
    """The number of the controller that it had heard before it looked at `composed_through`; 0:
    none, or it does not say."""

    answered: int = 0
    """The newest question of that controller that it had heard then; 0: none."""

    sealed_through: int = -1
    """Last seal that it has heard of in `generation`; -1: none."""

    alone: tuple[AloneSteps, ...] = ()
    """What it composed in `generation` without a seal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobChunk:
    """A piece of the dataset index (`index`) or of the tokenizer (`tokenizer`)."""

    name: str
    offset: int
    total_bytes: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """The controller is alive."""

    drain: bool = False
    """The run is over: serve what is asked, expect no more plans."""


EnlistEvent = RunSpec | BlobChunk | Beat
