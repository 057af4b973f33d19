"""What a run delivers, by a plain model, and a run in this process that can be pulled apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from controller.history import plan_from
from loader_workers.reference import Reference
from loader_workers.service import LoaderService
from loader_workers.source import WindowSource
from protos.apportion import apportion, no_carry
from protos.dataset_index import DatasetIndex
from protos.planbook import PlanBook
from protos.slots import deal, lanes_of, rank_slots
from protos.spec import RunSpec
from protos.types import (
    Cursors,
    Generation,
    Lane,
    Mixture,
    OpenStream,
    Places,
    Plan,
    PlanEvent,
    Rank,
    Step,
    StepBatch,
)
from tests.fakes_loader import BlockingCredits
from trainer_client.delivered import DeliveredStep, assemble
from trainer_client.step_buffer import StepBuffer

Sequences = list[tuple[int, int, bytes]]
"""Domain, tokens that count, and tokens, slot by slot."""


class Model:
    """The global batch of every step, made step by step from the first, with no place kept."""

    def __init__(self, spec: RunSpec, index: DatasetIndex) -> None:
        self._spec = spec
        self._reference = Reference(spec, index, None)
        self._carry = no_carry(spec.num_domains)
        self._lanes = [
            [self._sequences(name, Lane(lane)) for name in spec.domains]
            for lane in range(spec.lanes)
        ]
        self.steps: list[Sequences] = []

    def add(self, mixture: Mixture) -> None:
        """Go on by a step with this mixture."""
        spec = self._spec
        counts, self._carry = apportion(
            mixture, global_sequences=spec.global_sequences, carry=self._carry
        )
        labels = deal(counts, lanes=spec.lanes, seed=spec.seed, step=Step(len(self.steps)))
        step: Sequences = []
        for lane, domains in enumerate(labels.tolist()):
            step += ((domain, *next(self._lanes[lane][domain])) for domain in domains)
        self.steps.append(step)

    def _sequences(self, domain: str, lane: Lane) -> Iterator[tuple[int, bytes]]:
        for epoch in count():
            for window in range(self._reference.num_windows(domain, lane, epoch)):
                tokens, num_tokens = self._reference.sequences(domain, lane, epoch, window)
                for row, number in zip(tokens, num_tokens.tolist(), strict=True):
                    yield number, row.tobytes()


@dataclass(eq=False)
class Stream:
    """A stream that a rank has open from a worker."""

    worker: LoaderService
    lanes: list[Lane]
    batches: Iterator[StepBatch]
    credits: BlockingCredits

    def close(self) -> None:
        """Break it."""
        self.credits.end()
        self.batches.close()  # type: ignore[attr-defined]


@dataclass(eq=False)
class RankInProcess:
    """A rank's slots, what was delivered to it, and its streams."""

    rank: Rank
    slots: range
    lanes: list[Lane]
    buffer: StepBuffer
    streams: list[Stream] = field(default_factory=list)


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    """Each rank's cursors before a step."""

    step: Step
    cursors: list[Cursors]


class RunInProcess:
    """Workers' services, ranks' buffers and a controller's word, without wire or clock."""

    def __init__(self, source: WindowSource, first: Mixture) -> None:
        self._source = source
        self._spec = source.spec
        self._book = PlanBook(global_sequences=self._spec.global_sequences)
        carry = tuple(no_carry(self._spec.num_domains).tolist())
        self._book.add(Plan(version=1, first_step=Step(0), mixture=first, carry_q32=carry))
        zeros = np.zeros((self._spec.num_domains, 3), np.uint32)
        start = {Lane(lane): zeros for lane in range(self._spec.lanes)}
        self._ledger: dict[Step, Cursors] = {Step(0): start}
        self._generation = Generation(0)
        self._floor = Step(0)
        self.workers: list[LoaderService] = []
        self.ranks: list[RankInProcess] = []
        self.first_step = self.next_step = Step(0)
        self.cursors: list[Cursors] = []
        """Each rank's, after the last step trained."""

        self.sealed_through = -1

    def mixture_at(self, step: int) -> Mixture:
        """Return what holds at a step."""
        return self._book.plan_at(Step(step)).mixture

    def seal(self, num_steps: int, mixture: Mixture | None = None) -> None:
        """Seal more steps, with another mixture from the first of them on."""
        first = Step(self.sealed_through + 1)
        last = self._book.plans[-1]
        plans: tuple[Plan, ...] = ()
        if mixture is not None and mixture != last.mixture and first > last.first_step:
            carry = tuple(self._book.carry(first).tolist())
            plans = (
                Plan(version=last.version + 1, first_step=first, mixture=mixture, carry_q32=carry),
            )
            self._book.add(plans[0])
        self.sealed_through += num_steps
        for worker in self.workers:
            worker.hear(
                PlanEvent(
                    generation=self._generation, plans=plans, sealed_through=self.sealed_through
                )
            )

    def add_worker(self) -> None:
        """Start a worker; it serves lanes when streams are opened anew."""
        worker = LoaderService()
        worker.configure(self._source)
        self._tell_all(worker)
        self.workers.append(worker)

    def lose_worker(self, number: int) -> None:
        """End a worker; what it had composed and not delivered is gone."""
        worker = self.workers.pop(number)
        for rank in self.ranks:
            for stream in [each for each in rank.streams if each.worker is worker]:
                rank.streams.remove(stream)
                stream.close()
                self._open(rank, stream.lanes)

    def begin(self, world_size: int, step: Step, resumes: Sequence[Cursors]) -> None:
        """Begin a generation: lanes that no rank's state holds go on from the ledger."""
        self.close()
        self.first_step = self.next_step = step
        self._generation = Generation(self._generation + 1)
        places = self._known_before(step)
        for cursors in resumes:
            places.update((lane, (step, cursor)) for lane, cursor in cursors.items())
        hindmost = min(at for at, _ in places.values())
        self._floor = Step(max(min(hindmost, self.sealed_through), 0))
        for worker in self.workers:
            self._tell_all(worker)
        spec = self._spec
        for number in range(world_size):
            slots = rank_slots(
                number, world_size=world_size, global_sequences=spec.global_sequences
            )
            lanes = lanes_of(slots, slots_per_lane=spec.slots_per_lane)
            buffer = StepBuffer(
                spec=spec,
                slots=slots,
                lanes=lanes,
                first_step=step,
                cursors={lane: places[lane][1] for lane in lanes},
                cursor_steps={lane: places[lane][0] for lane in lanes},
            )
            rank = RankInProcess(Rank(number), slots, lanes, buffer)
            self.ranks.append(rank)
            self._open(rank, lanes)

    def prefetch(self, rank: RankInProcess, stream: Stream, num_steps: int) -> None:
        """Deliver up to so many sealed steps of a stream to its rank, ahead of the others."""
        for _ in range(num_steps):
            if rank.buffer.next_step(stream.lanes[0]) <= self.sealed_through:
                rank.buffer.put(next(stream.batches), stream.lanes)

    def train(self, *, reported: bool) -> Sequences:
        """Take a sealed step at every rank; return its global batch."""
        step, taken = self.next_step, []
        for rank in self.ranks:
            for stream in rank.streams:
                if rank.buffer.next_step(stream.lanes[0]) == step:
                    self.prefetch(rank, stream, 1)
            taken.append(assemble(rank.buffer.take(step), rank.slots, step))
        self.next_step = Step(step + 1)
        self.cursors = [delivered.cursors for delivered in taken]
        _check_shared_lanes(self.cursors)
        if reported:
            known = self._ledger.setdefault(self.next_step, {})
            known.update({lane: cursor for each in self.cursors for lane, cursor in each.items()})
        return [row for delivered in taken for row in _rows(delivered)]

    def close(self) -> None:
        """End all ranks."""
        for rank in self.ranks:
            for stream in rank.streams:
                stream.close()
        self.ranks = []

    def _known_before(self, step: Step) -> dict[Lane, tuple[Step, Places]]:
        known: dict[Lane, tuple[Step, Places]] = {}
        for at in sorted(self._ledger):
            if at <= step:
                known.update({lane: (at, cursor) for lane, cursor in self._ledger[at].items()})
        return known

    def _tell_all(self, worker: LoaderService) -> None:
        if not self._generation:
            return
        later = (plan for plan in self._book.plans if plan.first_step > self._floor)
        worker.hear(
            PlanEvent(
                generation=self._generation,
                plans=(plan_from(self._book, self._floor), *later),
                sealed_through=self.sealed_through,
                reset=True,
            )
        )

    def _open(self, rank: RankInProcess, lanes: Sequence[Lane]) -> None:
        """Open streams of lanes from whoever serves them now."""
        for number, worker in enumerate(self.workers):
            mine = [
                lane for lane in lanes if lane * len(self.workers) // self._spec.lanes == number
            ]
            if mine:
                rank.streams.append(self._stream(rank, worker, mine))

    def _stream(self, rank: RankInProcess, worker: LoaderService, lanes: list[Lane]) -> Stream:
        places = {lane: rank.buffer.place(lane) for lane in lanes}
        credits = BlockingCredits()
        opening = OpenStream(
            run_id=self._spec.run_id,
            generation=self._generation,
            rank=rank.rank,
            from_step=rank.buffer.next_step(lanes[0]),
            first_slot=rank.slots.start,
            end_slot=rank.slots.stop,
            cursors={lane: cursor for lane, (cursor, _) in places.items()},
            cursor_steps={lane: step for lane, (_, step) in places.items()},
            credits=self._spec.num_steps,
        )
        return Stream(worker, lanes, worker.stream_batches(opening, credits), credits)


def _rows(delivered: DeliveredStep) -> Sequences:
    return [
        (int(domain), int(number), tokens.tobytes())
        for domain, number, tokens in zip(
            delivered.domain_ids, delivered.num_tokens, delivered.tokens, strict=True
        )
    ]


def _check_shared_lanes(cursors: Sequence[Cursors]) -> None:
    for one, other in zip(cursors, cursors[1:], strict=False):
        for lane in one.keys() & other.keys():
            np.testing.assert_array_equal(one[lane], other[lane])
