"""The plans that a worker heard of, and the wait until a step may be composed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader_workers.alone import Alone
from protos.errors import NotReady, StaleGeneration
from protos.planbook import PlanBook
from protos.slots import lane_counts
from protos.spec import RunSpec
from protos.types import AloneSteps, Generation, Lane, Plan, PlanEvent, Step

logger = logging.getLogger(__name__)

GENERATION_WAIT_S = 5.0
"""How long a stream of a generation that is not heard of yet waits for word of it."""

_LONGEST_WAIT_S = 1.0
"""Waits are cut into pieces of this length, to look at the clock."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Turn:
    """A step that may be composed now, or some consecutive ones under one plan."""

    plan_version: int
    counts: NDArray[np.int64]
    """[steps, domains]"""

    shares: tuple[float, ...]
    """[domains]: of the mixture in force."""

    degraded: bool


class PlanBoard:
    """Plans and seals of the newest generation. `changed` guards this and the streams' states.

    caller   call             waits for                                   woken by
    stream   wait_generation  word of its generation, `GENERATION_WAIT_S` hear, close
    stream   wait_turn        a credit and a seal (or a long silence)     hear, close, its rank
    session  hear             never                                       -
    """

    def __init__(self, spec: RunSpec, *, now: Callable[[], float] = time.monotonic) -> None:
        self.changed = threading.Condition()
        self._spec = spec
        self._now = now
        self._book = PlanBook(global_sequences=spec.global_sequences)
        self._heard_at = now()
        self._closed = False
        self._degraded: set[Step] = set()
        self._alone = Alone()
        self._epoch = 0
        self.answered = 0
        """The newest question of the controller that was heard; 0: none."""

        self.generation = Generation(0)
        self.composed_through = -1
        """The last step of this generation that a stream was given a turn for."""

    @property
    def epoch(self) -> int:
        """The number of the controller that was heard last; 0: it has none."""
        return self._epoch

    @property
    def sealed_through(self) -> int:
        """The last step whose plan is final; -1: none."""
        return self._book.sealed_through

    @property
    def num_degraded(self) -> int:
        """How many steps were composed without their seal, in all generations."""
        return len(self._degraded)

    @property
    def alone(self) -> tuple[AloneSteps, ...]:
        """What was composed in this generation without its seal."""
        return self._alone.said()

    @property
    def newest_shares(self) -> tuple[float, ...] | None:
        """[domains]: of the newest mixture that was heard of; None: there is none yet."""
        with self.changed:
            return self._book.plans[-1].mixture.shares if self._book.plans else None

    def hear(self, event: PlanEvent) -> None:
        """Take in what the controller says; an empty event says that it lives.

        Raises:
            InvalidMessage: the plans do not lead to one another.
        """
        with self.changed:
            if 0 < event.epoch < self._epoch:
                logger.warning(
                    "ignored plans of controller %d, which %d has replaced",
                    event.epoch,
                    self._epoch,
                )
                return
            if event.epoch > self._epoch:
                self._epoch, self.answered = event.epoch, 0
            # Whoever is asked has heard the controller, so it goes on alone no more for a while.
            self.answered = max(self.answered, event.asked)
            self._heard_at = self._now()
            if event.generation < self.generation:
                logger.warning(
                    "ignored plans of generation %d, after %d", event.generation, self.generation
                )
                return
            plans = event.plans
            if event.reset:
                self._book, plans = self._begin_book(event)
                if event.generation > self.generation:
                    self.composed_through = -1
                    self._alone = Alone()
                self.generation = event.generation
            elif event.generation != self.generation:
                # Without the plans from its start a generation cannot be composed.
                return
            if event.reset or plans:
                self._alone.heard_plans()
            for plan in plans:
                self._book.add(plan)
            self._book.sealed_through = max(self._book.sealed_through, event.sealed_through)
            self.changed.notify_all()

    def _begin_book(self, event: PlanEvent) -> tuple[PlanBook, tuple[Plan, ...]]:
        """Return the book of a reset, and the plans that are still to be added to it.

        A controller that was started anew tells the plans from where the hindmost lane stands. What
        came before is kept: a stream for steps ahead was given its places when it was opened.
        """
        book = PlanBook(global_sequences=self._spec.global_sequences)
        if event.generation != self.generation or not event.plans:
            return book, event.plans
        first = event.plans[0]
        for plan in self._book.plans:
            if plan.first_step < first.first_step:
                book.add(plan)
        if not book.plans or book.carry(first.first_step).tolist() != list(first.carry_q32):
            return PlanBook(global_sequences=self._spec.global_sequences), event.plans
        # The plan in force there is told as if it began there.
        goes_on = book.newest.version == first.version
        return book, event.plans[1:] if goes_on else event.plans

    def wait_generation(self, generation: Generation) -> None:
        """Wait until the newest generation is `generation`.

        Raises:
            StaleGeneration: a newer one has begun.
            NotReady: it is not heard of in time, or the worker is stopping.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self._closed or self.generation >= generation, GENERATION_WAIT_S
            )
            self._check_generation(generation)
            if self.generation < generation:
                raise NotReady(
                    f"this worker has not heard of generation {generation} yet, only of "
                    f"{self.generation}; ask again"
                )

    def wait_turn(
        self,
        step: Step,
        generation: Generation,
        *,
        may_send: Callable[[], int | None],
        needed_step: Callable[[], int],
        lanes: Iterable[Lane] = (),
        most_steps: int = 1,
    ) -> Turn | None:
        """Wait until a step may be composed; return its counts and those of steps after it.

        Args:
            step: the step to compose.
            generation: the stream's.
            may_send: how many steps the stream has credits for; None when its rank is gone.
            needed_step: the step that the rank waits for now; -1: it does not wait.
            lanes: the stream's.
            most_steps: so many at most, of those that may be composed now as well.

        Returns:
            None when the rank is gone.

        Raises:
            StaleGeneration: a newer generation has begun.
            NotReady: the worker is stopping.
            InvalidMessage: no plan that is held reaches back to the step.
        """
        with self.changed:
            while True:
                credit = may_send()
                if credit is None:
                    return None
                self._check_generation(generation)
                if credit and self._alone.book_at(step) is not None:
                    return self._alone_turn(step, lanes)
                if credit and step <= self.sealed_through:
                    return self._sealed_turn(step, min(credit, most_steps))
                silence_s = self._now() - self._heard_at
                wait_s = _LONGEST_WAIT_S
                if credit and needed_step() >= step and self._book.plans:
                    if silence_s >= self._spec.degraded_after_s:
                        return self._alone_turn(step, lanes)
                    wait_s = min(wait_s, self._spec.degraded_after_s - silence_s)
                self.changed.wait(wait_s)

    def lane_totals(
        self, lane_steps: Mapping[Lane, Step], end: Step
    ) -> dict[Lane, NDArray[np.int64]]:
        """Return how many sequences of each domain each lane uses from its step up to `end`.

        Raises:
            InvalidMessage: no plan that is held reaches back to one of the steps.
        """
        spec = self._spec
        totals = {lane: np.zeros(spec.num_domains, dtype=np.int64) for lane in lane_steps}
        with self.changed:
            for step in range(min(lane_steps.values()), end):
                book = self._alone.book_at(Step(step)) or self._book
                counts = lane_counts(
                    book.counts(Step(step)),
                    lanes=spec.lanes,
                    seed=spec.seed,
                    step=Step(step),
                )
                for lane, first in lane_steps.items():
                    if step >= first:
                        totals[lane] += counts[lane]
        return totals

    def forget_before(self, step: Step) -> None:
        """Drop the plans that no step from `step` on needs."""
        with self.changed:
            self._book.forget_before(step)
            self._alone.forget_before(step)

    def close(self) -> None:
        """Send all who wait away with `NotReady`; idempotent."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def _check_generation(self, generation: Generation) -> None:
        if self._closed:
            raise NotReady("the loader worker is stopping; ask another")
        if self.generation > generation:
            raise StaleGeneration(
                f"generation {generation} has ended, {self.generation} is the newest; join again"
            )

    def _sealed_turn(self, step: Step, most_steps: int) -> Turn:
        """Return the turn of sealed steps that are under one plan with the first."""
        ends = [step + most_steps, self.sealed_through + 1]
        ends += [
            end
            for end in (self._book.next_change(step), self._alone.next_after(step))
            if end is not None
        ]
        return self._turn(self._book, step, min(ends) - step)

    def _alone_turn(self, step: Step, lanes: Iterable[Lane]) -> Turn:
        """Return the turn of a step without a seal: the same for all streams."""
        book = self._alone.compose(step, lanes, self._book)
        self._degraded.add(step)
        return self._turn(book, step, 1, degraded=True)

    def _turn(self, book: PlanBook, step: Step, num_steps: int, *, degraded: bool = False) -> Turn:
        plan = book.plan_at(step)
        # Said before it is composed: a controller that comes back must not plan this step anew.
        self.composed_through = max(self.composed_through, step + num_steps - 1)
        return Turn(
            plan_version=plan.version,
            counts=np.stack([book.counts(Step(step + n)) for n in range(num_steps)]),
            shares=plan.mixture.shares,
            degraded=degraded,
        )
