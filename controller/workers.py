"""The loader workers that are there, and which lanes each of them serves."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from controller.asking import Questions, check_steps
from controller.lanes import LaneTable, Standing
from controller.ledger_schema import Entry, event_entry
from protos.errors import InvalidMessage, WrongRun
from protos.spec import RunSpec
from protos.status import WorkerStatus
from protos.types import AloneSteps, Generation, LaneEndpoint, Quarantine, WorkerBeat

MAX_REASON_LENGTH = 500
"""A longer reason for a quarantine is cut."""

ABSENCE_S = 3.0
"""A worker whose stream broke keeps its lanes for so long, if no rank misses it: networks blink."""


class Presence(enum.Enum):
    """HERE <-> ABSENT -> LOST -> HERE."""

    HERE = "here"
    ABSENT = "absent"  # its stream broke a moment ago; it keeps its lanes
    LOST = "lost"


MAX_COUNTED = (1 << 63) - 1
"""Where counting ends: what is told of it must fit a message."""


@dataclass(eq=False, slots=True)
class _Worker:
    beat: WorkerBeat
    heard_s: float
    presence: Presence = Presence.HERE
    absent_since_s: float = 0.0
    num_degraded: int = 0
    """Of all processes that bore this name."""

    @property
    def is_here(self) -> bool:
        return self.presence is Presence.HERE


class Workers:
    """Enlisted loader workers, by what they last said of themselves.

    One is lost when it is silent for `expiry_s`, when its stream breaks and does not come back for
    `absence_s`, or when its stream breaks and a rank says that it cannot be reached.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        expiry_s: float,
        now: Callable[[], float],
        absence_s: float = ABSENCE_S,
    ) -> None:
        self._spec = spec
        self._expiry_s = expiry_s
        self._absence_s = absence_s
        self._now = now
        self.wanted = 0
        """How many an operator wants; 0: nobody has said."""

        self.epoch = 0
        """The controller's number; 0: it has none."""

        self._expected: set[str] = set()
        """Workers that another controller had and this one has not heard."""

        self._expected_until_s = 0.0
        self._may_be_old = False
        """Whether a beat that names the controller may be from before it told the plans anew."""

        self._table = LaneTable(spec.lanes, now=now)
        self._events: list[Entry] = []
        self._workers: dict[str, _Worker] = {}
        self._beats_since_plans: dict[str, int] = {}
        self.questions = Questions()
        """How far has each gone alone?"""

        self.num_alone = 0
        """Grows whenever a worker says otherwise what it composed alone."""

        self._quarantined: dict[tuple[str, str, int], Quarantine] = {}

    def beat(self, beat: WorkerBeat) -> bool:
        """Take in what a worker says of itself; return True if it was not there before.

        Raises:
            WrongRun: it serves another run.
            InvalidMessage: a field cannot be right.
        """
        if beat.run_id not in ("", self._spec.run_id):
            raise WrongRun(
                f"worker {beat.worker_id} is of run {beat.run_id!r}, this controller runs "
                f"{self._spec.run_id!r}"
            )
        if not beat.worker_id or not beat.endpoint:
            raise InvalidMessage("a worker's beat must hold its worker_id and its endpoint")
        check_steps(beat, self._spec)
        self._expected.discard(beat.worker_id)
        known = self._workers.get(beat.worker_id)
        if beat.worker_id in self._beats_since_plans:
            self._beats_since_plans[beat.worker_id] += 1
        if beat.alone and (known is None or known.beat.alone != beat.alone):
            self.num_alone += 1
        if known is None:
            self._workers[beat.worker_id] = _Worker(
                beat=beat, heard_s=self._now(), num_degraded=beat.degraded_steps
            )
            self._give_lanes()
            return True
        same_process = known.beat.pid == beat.pid and known.beat.endpoint == beat.endpoint
        before = known.beat.degraded_steps if same_process else 0
        degraded = known.num_degraded + max(0, beat.degraded_steps - before)
        known.num_degraded = min(degraded, MAX_COUNTED)
        is_new = known.presence is Presence.LOST or not same_process
        is_changed = is_new or not known.is_here or _offer(beat) != _offer(known.beat)
        if known.beat.endpoint != beat.endpoint:
            self._table.moved_house()
        known.beat, known.heard_s, known.presence = beat, self._now(), Presence.HERE
        if is_changed:
            self._give_lanes()
        return is_new

    def told_plans(self, worker_id: str) -> None:
        """Note that a worker has been told the plans, over a new stream."""
        self._beats_since_plans[worker_id] = 0

    def has_answered(self, worker_id: str) -> bool:
        """Say whether a worker's last beat was sent after it had heard the question to it."""
        worker = self._workers.get(worker_id)
        return worker is not None and self.questions.has_answered(worker.beat, epoch=self.epoch)

    def heard_through(self, generation: Generation) -> int:
        """Return the last seal of a generation that a worker may have heard of; -1: none."""
        said = [
            worker.beat.sealed_through
            for worker in self._workers.values()
            if worker.beat.generation == generation
        ]
        return max([*said, self.questions.told_through()])

    def alone(self, generation: Generation) -> tuple[AloneSteps, ...]:
        """Return what workers composed in a generation without a seal."""
        return tuple(
            each
            for worker in self._workers.values()
            if worker.beat.generation == generation
            for each in worker.beat.alone
        )

    @property
    def owe_answers(self) -> bool:
        """Whether a worker was asked how far it went alone and has not said."""
        return any(
            self.questions.were_put_to(name) and not self.has_answered(name)
            for name, _ in self._alive()
        )

    def expect(self, names: Iterable[str]) -> None:
        """Give workers that were there before a while to come back: they may have gone on alone."""
        self._expected = set(names)
        self._expected_until_s = self._now() + self._absence_s

    def forget_told(self) -> None:
        """Have all workers count as not told: they are told all plans anew."""
        self._beats_since_plans.clear()
        self._may_be_old = True
        self.questions.ask_all_anew()

    def tells_no_more(self, worker_id: str) -> None:
        """Note that the stream of plans to a worker has ended."""
        self._beats_since_plans.pop(worker_id, None)
        self.questions.ask_anew(worker_id)

    def stream_ended(self, worker_id: str) -> bool:
        """Note that a worker's stream broke; return True if the worker had wanted to go."""
        worker = self._workers.get(worker_id)
        if worker is None or not worker.is_here:
            return False
        worker.presence = Presence.LOST if worker.beat.leaving else Presence.ABSENT
        worker.absent_since_s = self._now()
        self._give_lanes()
        return worker.beat.leaving

    def unreachable(self, endpoint: str) -> list[str]:
        """Take a rank's word that nobody answers at `endpoint`; return the workers lost by it.

        What a rank cannot reach and the controller hears no more of is dead, not slow. A worker
        that the controller does hear keeps its lanes: the rank may reach it at its next try.
        """
        lost = [
            name
            for name, worker in sorted(self._workers.items())
            if worker.presence is Presence.ABSENT and worker.beat.endpoint == endpoint
        ]
        self._lose(lost)
        return lost

    def expire(self) -> list[str]:
        """Return the workers that are lost now because they have been silent or absent too long.

        Lanes that have waited for calm are spread evenly now.
        """
        now = self._now()
        silent = [
            name
            for name, worker in sorted(self._workers.items())
            if (worker.is_here and worker.heard_s < now - self._expiry_s)
            or (
                worker.presence is Presence.ABSENT and worker.absent_since_s < now - self._absence_s
            )
        ]
        self._lose(silent)
        self._give_lanes()
        return silent

    def _lose(self, names: Iterable[str]) -> None:
        for name in names:
            self._workers[name].presence = Presence.LOST
        self._give_lanes()

    def _give_lanes(self) -> None:
        """Bring the table of lanes to the workers that there are."""
        moves = self._table.update(
            {
                name: Standing(
                    capacity=worker.beat.capacity_lanes or self._spec.lanes,
                    unwilling=worker.beat.leaving or worker.beat.starting,
                    absent=not worker.is_here,
                )
                for name, worker in self._workers.items()
                if worker.presence is not Presence.LOST
            }
        )
        if moves is not None:
            after = dict(moves.lanes_after)
            self._events.append(event_entry("lanes moved", lanes=moves.num_lanes, after=after))

    def take_events(self) -> list[Entry]:
        """Return what is to be recorded of lanes that moved since this was asked last."""
        events, self._events = self._events, []
        return events

    @property
    def serve_all_lanes(self) -> bool:
        """Whether every lane has a worker."""
        return self._table.is_complete

    @property
    def lanes_version(self) -> int:
        """Grows whenever a lane is served elsewhere."""
        return self._table.version

    @property
    def num_lanes_moved(self) -> int:
        """Lanes that went from one worker to another, in all."""
        return self._table.num_moved

    @property
    def are_managed(self) -> bool:
        """Whether somebody starts and ends workers as an operator wants."""
        return any(worker.beat.managed for _, worker in self._alive())

    def endpoints(self) -> tuple[LaneEndpoint, ...]:
        """Return who serves each lane, in order, to be told to ranks; empty: some has nobody.

        Lanes go in contiguous groups to the workers in the order of their names, as even as their
        capacities let them be; once ranks were told, they move no more than they must.
        """
        if not self._table.is_complete:
            return ()
        self._table.told()
        return tuple(
            LaneEndpoint(lane=lane, endpoint=self._workers[name].beat.endpoint, worker_id=name)
            for lane, name in self._table.owners.items()
        )

    def needed_beyond(self, sealed_through: int, generation: Generation) -> int | None:
        """Return the first step beyond the seal that some rank waits for; None: there is none."""
        needed = [
            worker.beat.needed_step
            for _, worker in self._alive()
            if worker.beat.generation == generation and worker.beat.needed_step > sealed_through
        ]
        return min(needed, default=None)

    def composed_through(self, generation: Generation) -> int:
        """Return the last step that a worker has composed in a generation; -1: none."""
        composed = [
            worker.beat.composed_through
            for worker in self._workers.values()
            if worker.beat.generation == generation
        ]
        return max(composed, default=-1)

    def are_settled(self) -> bool:
        """Say whether all lanes have workers that have heard the plans, and said where they are.

        A worker that has just heard the controller goes on alone no more. One that was asked has
        said so once it has answered. Of others a beat says whom they heard last; where it does not,
        or may be older, only the second beat after the plans was surely sent with them at hand.
        """
        if self._expected and self._now() < self._expected_until_s:
            return False
        return self._table.is_complete and all(
            # Who cannot serve yet has composed nothing.
            worker.beat.starting or self._has_heard(name, worker)
            for name, worker in self._alive()
        )

    def _has_heard(self, name: str, worker: _Worker) -> bool:
        if self.questions.were_put_to(name):
            return self.has_answered(name)
        told = 0 < self.epoch == worker.beat.heard_epoch and not self._may_be_old
        return told or self._beats_since_plans.get(name, 0) >= 2

    @property
    def num_degraded(self) -> int:
        """Steps that workers composed without a seal; those of one step count once."""
        return max((worker.num_degraded for worker in self._workers.values()), default=0)

    def quarantine(self, quarantines: Iterable[Quarantine]) -> list[Quarantine]:
        """Take in what workers leave out; return what was not known yet.

        Raises:
            InvalidMessage: a domain is named that the run does not have.
        """
        fresh = []
        for quarantine in quarantines:
            if quarantine.domain not in self._spec.domains:
                raise InvalidMessage(
                    f"a quarantine names domain {quarantine.domain!r}; the run has "
                    f"{', '.join(self._spec.domains)}"
                )
            key = (quarantine.domain, quarantine.shard, quarantine.sample)
            if key not in self._quarantined:
                short = Quarantine(
                    domain=quarantine.domain,
                    shard=quarantine.shard,
                    sample=quarantine.sample,
                    reason=quarantine.reason[:MAX_REASON_LENGTH],
                )
                self._quarantined[key] = short
                fresh.append(short)
        return fresh

    @property
    def quarantines(self) -> tuple[Quarantine, ...]:
        """All that is left out of the data."""
        return tuple(self._quarantined.values())

    def statuses(self) -> tuple[WorkerStatus, ...]:
        """Return all workers that were ever there, as `headrace status` shows them."""
        now, lanes = self._now(), dict[str, list[int]]()
        for lane, name in self._table.owners.items():
            lanes.setdefault(name, []).append(lane)
        return tuple(
            WorkerStatus(
                worker_id=name,
                endpoint=worker.beat.endpoint,
                alive=worker.presence is not Presence.LOST,
                lanes=tuple(lanes.get(name, ())),
                cache_bytes=worker.beat.cache_bytes,
                stall_s=worker.beat.stall_s,
                sequences_served=worker.beat.sequences_served,
                leaving=worker.beat.leaving,
                managed=worker.beat.managed,
                silent_s=max(now - worker.heard_s, 0.0),
            )
            for name, worker in sorted(self._workers.items())
        )

    def _alive(self) -> list[tuple[str, _Worker]]:
        return [(name, worker) for name, worker in sorted(self._workers.items()) if worker.is_here]


def _offer(beat: WorkerBeat) -> tuple[bool, bool, int]:
    """Return what of a beat decides about lanes."""
    return beat.leaving, beat.starting, beat.capacity_lanes
