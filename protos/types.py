"""The values that controller, loader workers and trainers exchange, checked at birth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from protos.documents import DocumentStarts
from protos.spec import RunSpec

Rank = NewType("Rank", int)
Step = NewType("Step", int)
Lane = NewType("Lane", int)
Generation = NewType("Generation", int)

SHARE_ONE = 1 << 32
"""A share of 1, in the units of `Mixture.shares_q32`."""

Places = NDArray[np.uint32]
"""[domains, 3]: epoch, window and sequence of one lane in every domain."""

Cursors = dict[Lane, Places]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The share of the sequences that each domain gets, quantised so that all compute alike."""

    shares_q32: tuple[int, ...]
    """In the order of the run's domains, in units of 2^-32; they add up to exactly 2^32."""

    def __post_init__(self) -> None:
        if not self.shares_q32:
            raise ValueError("a mixture must have at least one domain, got none")
        if min(self.shares_q32) < 0:
            raise ValueError(f"mixture shares must not be negative, got {self.shares_q32}")
        if sum(self.shares_q32) != SHARE_ONE:
            raise ValueError(
                f"mixture shares must add up to 2^32 = {SHARE_ONE}, got {sum(self.shares_q32)}"
            )

    @classmethod
    def from_shares(cls, shares: Sequence[float]) -> Mixture:
        """Scale `shares` to a sum of 1, quantised by largest remainder; a share of 0 stays 0.

        Raises:
            ValueError: if a share is negative or not finite, or all are 0.
        """
        if any(not math.isfinite(share) or share < 0 for share in shares):
            raise ValueError(f"shares must be finite and not negative, got {list(shares)}")
        exact = [Fraction(share) for share in shares]
        total = sum(exact)
        if total <= 0:
            raise ValueError(f"at least one share must be above 0, got {list(shares)}")
        scaled = [share * SHARE_ONE / total for share in exact]
        floors = [share.numerator // share.denominator for share in scaled]
        remainders = [share - floor for share, floor in zip(scaled, floors, strict=True)]
        by_remainder = sorted(range(len(scaled)), key=lambda index: (-remainders[index], index))
        for index in by_remainder[: SHARE_ONE - sum(floors)]:
            floors[index] += 1
        return cls(tuple(floors))

    @classmethod
    def uniform(cls, num_domains: int) -> Mixture:
        """Give every domain the same share."""
        return cls.from_shares([1.0] * num_domains)

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares as fractions of 1."""
        return tuple(share / SHARE_ONE for share in self.shares_q32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A mixture and the first step for which it holds."""

    version: int
    """Grows by one with each plan of a run."""

    first_step: Step
    mixture: Mixture
    carry_q32: tuple[int, ...]
    """Apportionment error carried into `first_step`, in units of 2^-32 sequences, one a domain."""

    def __post_init__(self) -> None:
        if len(self.carry_q32) != len(self.mixture.shares_q32):
            raise ValueError(
                f"a plan carries one error a domain, got {len(self.carry_q32)} "
                f"for {len(self.mixture.shares_q32)} domains"
            )
        if self.version < 0 or self.first_step < 0:
            raise ValueError(
                "version and first_step must not be negative, "
                f"got {self.version}, {self.first_step}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEvent:
    """What a loader worker hears: plans in force from a step on, and how far they are final."""

    generation: Generation
    plans: tuple[Plan, ...]
    """New since the last event, in order of `first_step`."""

    sealed_through: int
    """The plan of every step up to this one is final; -1: none yet."""

    reset: bool = False
    """Forget all plans held: a generation begins at `plans[0].first_step`."""

    epoch: int = 0
    """The controller's number, which grows with each that opens the ledger; 0: it has none."""

    asked: int = 0
    """Number of a question: how far has the worker gone alone? Plans come once a beat has answered
    it. 0: nothing is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AloneSteps:
    """Steps that a worker composed without their seal, because the controller was silent."""

    first_step: Step
    last_step: Step
    plan_version: int
    lanes: tuple[Lane, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.first_step <= self.last_step or not self.lanes:
            raise ValueError(
                f"steps {self.first_step}..{self.last_step} of {len(self.lanes)} lanes cannot have "
                "been composed alone"
            )


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


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class OpenStream:
    """A rank asks a loader worker for the batches of some lanes."""

    run_id: str
    generation: Generation
    rank: Rank
    from_step: Step
    first_slot: int
    """Only slots in [first_slot, end_slot) of the global batch are sent."""

    end_slot: int
    cursors: Cursors
    """One for each lane asked for."""

    cursor_steps: Mapping[Lane, Step]
    """The step before which each cursor stands; one that is behind `from_step` is wound forward."""

    credits: int
    """Steps that may be sent before the first `Credit`."""

    documents: bool = False
    """Send where documents begin."""

    most_steps: int = 1
    """That may come in one `StepBatch`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """A rank consumed batches, or waits for one."""

    steps: int = 0
    """So many more steps may be sent."""

    needed_step: int = -1
    """The trainer waits for this step now; -1: it does not wait."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LaneBatch:
    """One lane's sequences of a step, in slot order; or of several, step after step."""

    lane: Lane
    first_slot: int
    """Of each step's first sequence here."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """[sequences, sequence_length + 1]"""

    domain_ids: NDArray[np.uint16]
    """[sequences]"""

    num_tokens: NDArray[np.uint32]
    """[sequences]: how many of the tokens are not padding."""

    places: NDArray[np.uint32]
    """[sequences, 3]: epoch, window and sequence that each came from."""

    cursor_after: Places
    """The whole lane's place in every domain after the last step."""

    earlier_cursors: NDArray[np.uint32] | None = None
    """[steps - 1, domains, 3]: the same after each step before it; None: there is only one step."""

    documents: DocumentStarts | None = None
    """Of these sequences; None: not asked for."""

    @property
    def num_steps(self) -> int:
        """How many steps the sequences belong to."""
        return 1 if self.earlier_cursors is None else len(self.earlier_cursors) + 1

    @property
    def sequences_a_step(self) -> int:
        """How many of the sequences belong to each step."""
        return len(self.tokens) // self.num_steps

    def cursor_at(self, index: int) -> Places:
        """Return the lane's place after one of the steps."""
        if self.earlier_cursors is None or index == len(self.earlier_cursors):
            return self.cursor_after
        earlier: Places = self.earlier_cursors[index]
        return earlier

    def at(self, index: int) -> LaneBatch:
        """Return one step's part, as views."""
        if self.earlier_cursors is None:
            return self
        count = self.sequences_a_step
        rows = slice(index * count, (index + 1) * count)
        return LaneBatch(
            lane=self.lane,
            first_slot=self.first_slot,
            tokens=self.tokens[rows],
            domain_ids=self.domain_ids[rows],
            num_tokens=self.num_tokens[rows],
            places=self.places[rows],
            cursor_after=self.cursor_at(index),
            documents=None if self.documents is None else self.documents.of_rows(rows),
        )


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepBatch:
    """What one stream carries of one step, or of some consecutive ones under one plan."""

    step: Step
    """The first of them."""

    plan_version: int
    degraded: bool
    """Composed with the last plan, because no seal came."""

    lanes: tuple[LaneBatch, ...]
    num_steps: int = 1

    def __post_init__(self) -> None:
        for part in self.lanes:
            if part.num_steps != self.num_steps or len(part.tokens) % self.num_steps:
                raise ValueError(
                    f"step {self.step}: lane {part.lane} must hold {self.num_steps} steps of "
                    f"equally many sequences, got {part.num_steps} steps and {len(part.tokens)}"
                )
