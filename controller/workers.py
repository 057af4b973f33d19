"""The loader workers that are there, and which lanes each of them serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protos.errors import InvalidMessage, WrongRun
from protos.spec import RunSpec
from protos.status import WorkerStatus
from protos.types import Generation, Lane, LaneEndpoint, Quarantine, WorkerBeat

MAX_REASON_LENGTH = 500
"""A longer reason for a quarantine is cut."""


@dataclass(eq=False, slots=True)
class _Worker:
    beat: WorkerBeat
    heard_s: float
    alive: bool = True
    num_degraded: int = 0
    """Of all processes that bore this name."""


class Workers:
    """Enlisted loader workers, by what they last said of themselves.

    One that is silent for `expiry_s`, or whose stream breaks, is lost until it enlists again.
    """

    def __init__(self, spec: RunSpec, *, expiry_s: float, now: Callable[[], float]) -> None:
        self._spec = spec
        self._expiry_s = expiry_s
        self._now = now
        self._workers: dict[str, _Worker] = {}
        self._beats_since_plans: dict[str, int] = {}
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
        known = self._workers.get(beat.worker_id)
        if beat.worker_id in self._beats_since_plans:
            self._beats_since_plans[beat.worker_id] += 1
        if known is None:
            self._workers[beat.worker_id] = _Worker(
                beat=beat, heard_s=self._now(), num_degraded=beat.degraded_steps
            )
            return True
        same_process = known.beat.pid == beat.pid and known.beat.endpoint == beat.endpoint
        before = known.beat.degraded_steps if same_process else 0
        known.num_degraded += max(0, beat.degraded_steps - before)
        is_new = not known.alive or not same_process
        known.beat, known.heard_s, known.alive = beat, self._now(), True
        return is_new

    def told_plans(self, worker_id: str) -> None:
        """Note that a worker has been told the plans, over a new stream."""
        self._beats_since_plans[worker_id] = 0

    def tells_no_more(self, worker_id: str) -> None:
        """Note that the stream of plans to a worker has ended."""
        self._beats_since_plans.pop(worker_id, None)

    def lose(self, worker_id: str) -> bool:
        """Take a worker for lost; return False if it was lost already."""
        worker = self._workers.get(worker_id)
        if worker is None or not worker.alive:
            return False
        worker.alive = False
        return True

    def expire(self) -> list[str]:
        """Return the workers that are lost now because they have been silent too long."""
        limit = self._now() - self._expiry_s
        silent = [name for name, worker in self._alive() if worker.heard_s < limit]
        for name in silent:
            self.lose(name)
        return silent

    def endpoints(self) -> tuple[LaneEndpoint, ...]:
        """Return who serves each lane, in order; empty while some lane has nobody.

        Contiguous groups of lanes go to the workers in the order of their names, as even as their
        capacities let them be.
        """
        alive = self._alive()
        shares = self._fair_shares([worker.beat.capacity_lanes for _, worker in alive])
        endpoints: list[LaneEndpoint] = []
        for (name, worker), num_lanes in zip(alive, shares, strict=True):
            for _ in range(num_lanes):
                lane = Lane(len(endpoints))
                endpoints.append(
                    LaneEndpoint(lane=lane, endpoint=worker.beat.endpoint, worker_id=name)
                )
        return tuple(endpoints) if len(endpoints) == self._spec.lanes else ()

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

        A worker that has just been told the plans goes on with its own no more; but only the second
        beat after that was surely sent with the plans at hand.
        """
        return bool(self.endpoints()) and all(
            self._beats_since_plans.get(name, 0) >= 2 for name, _ in self._alive()
        )

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
        lanes: dict[str, list[int]] = {}
        for endpoint in self.endpoints():
            lanes.setdefault(endpoint.worker_id, []).append(endpoint.lane)
        return tuple(
            WorkerStatus(
                worker_id=name,
                endpoint=worker.beat.endpoint,
                alive=worker.alive,
                lanes=tuple(lanes.get(name, ())),
                cache_bytes=worker.beat.cache_bytes,
                stall_s=worker.beat.stall_s,
                sequences_served=worker.beat.sequences_served,
            )
            for name, worker in sorted(self._workers.items())
        )

    def _alive(self) -> list[tuple[str, _Worker]]:
        return [(name, worker) for name, worker in sorted(self._workers.items()) if worker.alive]

    def _fair_shares(self, capacities: list[int]) -> list[int]:
        """Return how many lanes each worker gets; all zeros if they cannot take all lanes."""
        lanes = self._spec.lanes
        limits = [capacity or lanes for capacity in capacities]
        if sum(limits) < lanes:
            return [0] * len(limits)
        shares = [0] * len(limits)
        # Workers with little room are filled first; the rest is spread over the others.
        order = sorted(range(len(limits)), key=lambda index: (limits[index], -index))
        left = lanes
        for position, index in enumerate(order):
            shares[index] = min(limits[index], left // (len(order) - position))
            left -= shares[index]
        return shares
