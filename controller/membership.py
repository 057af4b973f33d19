"""The barrier of Join: who is in a generation, and whether its ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from protos.errors import Disagreement, HeadraceError, InvalidMessage, JoinTimeout, WrongRun
from protos.slots import lanes_of, rank_slots
from protos.spec import RunSpec
from protos.types import Cursors, Generation, JoinRequest, Lane, Places, Rank, Step


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Membership:
    """The ranks of one generation, and where they start."""

    generation: Generation
    world_size: int
    first_step: Step
    attempt_ids: Mapping[Rank, str]
    cursors: Cursors
    """Of every lane."""

    cursor_steps: Mapping[Lane, Step]
    """The step before which each of `cursors` stands."""

    def is_member(self, request: JoinRequest) -> bool:
        """Say whether the very process that asks is in this generation."""
        return (
            request.world_size == self.world_size
            and self.attempt_ids.get(request.rank) == request.attempt_id
        )

    def lanes_of(self, rank: Rank, spec: RunSpec) -> list[Lane]:
        """Return the lanes that a rank consumes, whole or in part."""
        slots = rank_slots(rank, world_size=self.world_size, global_sequences=spec.global_sequences)
        return lanes_of(slots, slots_per_lane=spec.slots_per_lane)


@dataclass(eq=False, slots=True)
class Gathering:
    """Ranks that wait for one another. It ends in a `Membership` or in an error for all of them.

    Whoever waits is told by `on_end`, once.
    """

    requests: dict[Rank, JoinRequest] = field(default_factory=dict)
    is_starting: bool = False
    """All are there: no rank is let in or out any more."""

    outcome: Membership | HeadraceError | None = None
    on_end: list[Callable[[], None]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """How many ranks there will be."""
        return next(iter(self.requests.values())).world_size

    @property
    def first_step(self) -> Step:
        """The step at which all of them start."""
        return resume_step(next(iter(self.requests.values())))

    def missing(self) -> list[int]:
        """Return the ranks that have not come yet."""
        return [rank for rank in range(self.world_size) if Rank(rank) not in self.requests]

    def end(self, outcome: Membership | HeadraceError) -> None:
        """Give all who wait their answer."""
        if self.outcome is None:
            self.outcome = outcome
            for tell in self.on_end:
                tell()


class JoinBarrier:
    """Gathers ranks until a generation is complete. Knows no clock and no network.

    A rank that does not fit the others ends the gathering for all: they were started together, and
    none of them can go on. A process that asks twice waits once; a new process of a rank takes the
    place of the old one.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._gathering = Gathering()

    def offer(self, request: JoinRequest) -> Gathering:
        """Let a rank in; return what it waits for.

        Raises:
            WrongRun: it wants another run.
            InvalidMessage: a cursor cannot be right.
            Disagreement: it differs from the run or from a rank that waits; those are told too.
        """
        if request.run_id not in ("", self._spec.run_id):
            raise WrongRun(
                f"rank {request.rank} wants run {request.run_id!r}, this controller runs "
                f"{self._spec.run_id!r}"
            )
        _check_cursors(request, self._spec)
        if self._gathering.is_starting:
            known = self._gathering.requests.get(request.rank)
            is_known = known is not None and known.attempt_id == request.attempt_id
            if is_known and self._gathering.outcome is None:
                return self._gathering
            self._gathering = Gathering()
        try:
            _check_agrees_with_run(request, self._spec)
            for other in self._gathering.requests.values():
                if other.rank != request.rank or other.attempt_id == request.attempt_id:
                    _check_agree(other, request)
        except Disagreement as error:
            ended, self._gathering = self._gathering, Gathering()
            ended.end(error)
            raise
        self._gathering.requests[request.rank] = request
        return self._gathering

    def withdraw(self, gathering: Gathering, request: JoinRequest) -> None:
        """Let a rank out that waits no longer, unless the generation is about to begin."""
        held = gathering.requests.get(request.rank)
        if held is request and not gathering.is_starting:
            del gathering.requests[request.rank]

    def starting(self, gathering: Gathering) -> bool:
        """Close the gathering if all ranks are there; return True to the first who asks."""
        if gathering.is_starting or not gathering.requests or gathering.missing():
            return False
        gathering.is_starting = True
        return True

    @property
    def gathering(self) -> Gathering:
        """The ranks that wait now."""
        return self._gathering


def resume_step(request: JoinRequest) -> Step:
    """Return the step at which a rank wants to start."""
    return request.resume.step if request.resume is not None else Step(0)


def timed_out(gathering: Gathering, request: JoinRequest) -> JoinTimeout:
    """Say which ranks have not come."""
    there = set(gathering.requests) | {request.rank}
    missing = [rank for rank in range(request.world_size) if Rank(rank) not in there]
    names = ", ".join(str(rank) for rank in missing[:20])
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return JoinTimeout(
        f"rank {request.rank} waited {request.timeout_s:g} s, but of {request.world_size} ranks "
        f"these did not join: {names}{more}; see whether their processes have started"
    )


def joined_cursors(
    gathering: Gathering, known: Mapping[Lane, tuple[Step, Places]], spec: RunSpec
) -> tuple[Cursors, dict[Lane, Step]]:
    """Return each lane's place: a rank's own if it has one, else what is `known`, else the start.

    Raises:
        Disagreement: two ranks hold different places of a lane.
    """
    cursors: Cursors = {}
    steps: dict[Lane, Step] = {}
    holders: dict[Lane, Rank] = {}
    for rank in sorted(gathering.requests):
        resume = gathering.requests[rank].resume
        for lane, places in (resume.cursors if resume is not None else {}).items():
            if lane in cursors and not np.array_equal(cursors[lane], places):
                raise Disagreement(
                    f"rank {holders[lane]} resumes lane {lane} at {cursors[lane].tolist()}, rank "
                    f"{rank} at {places.tolist()}; give all ranks the same checkpoint"
                )
            cursors[lane], holders[lane] = places, rank
            steps[lane] = gathering.first_step
    for lane in map(Lane, range(spec.lanes)):
        if lane not in cursors:
            start = (Step(0), np.zeros((spec.num_domains, 3), dtype=np.uint32))
            steps[lane], cursors[lane] = known.get(lane, start)
    return cursors, steps


def _check_agrees_with_run(request: JoinRequest, spec: RunSpec) -> None:
    for name in ("global_sequences", "sequence_length"):
        wanted, given = getattr(spec, name), getattr(request, name)
        if given not in (0, wanted):
            raise Disagreement(
                f"rank {request.rank} expects {name} = {given}, the run has {wanted}; change the "
                f"trainer's setting, or batch.{name} of the run file"
            )
    if request.world_size > spec.global_sequences:
        raise Disagreement(
            f"rank {request.rank} is of {request.world_size} ranks, but the run has "
            f"global_sequences = {spec.global_sequences}, less than one for each; use fewer ranks"
        )
    resume = request.resume
    if resume is not None and not spec.has_order(resume.order_sha256):
        raise Disagreement(
            f"rank {request.rank} resumes a run whose data has the order "
            f"{resume.order_sha256[:12] or 'unknown'}, this run's is {spec.order_sha256()[:12]}: "
            "seed, domains, batch, index or tokenizer differ from those of the checkpoint"
        )


def _check_agree(other: JoinRequest, request: JoinRequest) -> None:
    pairs = (
        ("world_size", other.world_size, request.world_size),
        ("global_sequences", other.global_sequences, request.global_sequences),
        ("sequence_length", other.sequence_length, request.sequence_length),
        ("resume.step", resume_step(other), resume_step(request)),
    )
    for name, there, here in pairs:
        unsaid = name in ("global_sequences", "sequence_length") and 0 in (there, here)
        if there != here and not unsaid:
            raise Disagreement(
                f"ranks {other.rank} and {request.rank} differ in {name}: {there} and {here}; "
                "start all ranks with the same settings and the same checkpoint"
            )


def _check_cursors(request: JoinRequest, spec: RunSpec) -> None:
    if request.resume is None:
        return
    for lane, places in request.resume.cursors.items():
        if not 0 <= lane < spec.lanes or places.shape != (spec.num_domains, 3):
            raise InvalidMessage(
                f"rank {request.rank} resumes lane {lane} with places of shape {places.shape}; the "
                f"run has {spec.lanes} lanes and {spec.num_domains} domains"
            )
