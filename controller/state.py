"""Where a run stands: its plans, its ranks and their places. Knows no thread and no file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile

from controller import history as past
from controller.aggregate import Aggregator
from controller.amends import Amendment, amend
from controller.draft import Draft
from controller.history import History, LaneCursors
from controller.ledger_schema import CARRY_EVERY
from controller.membership import Membership
from protos.errors import Disagreement
from protos.planbook import PlanBook
from protos.spec import RunSpec
from protos.types import AloneSteps, Cursors, Generation, Lane, Plan, PlanEvent, Rank, Step

NO_GENERATION = Generation(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a worker has been told of the plans."""

    generation: Generation
    plan_version: int
    sealed_through: int


class RunState:
    """Changes only by the methods below, each of which comes after its commit to the ledger."""

    def __init__(self, spec: RunSpec, history: History, *, now: Callable[[], float]) -> None:
        self.spec = spec
        self.membership = history.membership
        self.sealed_through = history.sealed_through
        self.observed_through = history.observed_through
        """Last step that has been decided upon."""

        self.trained_through = history.closed_through
        """Last step that a rank has reported."""

        self.cursors: LaneCursors = history.cursors
        self.book: PlanBook = history.book
        self.newest_version = history.newest_version
        """The highest number that a plan of the run ever had."""

        self.split_through: dict[Lane, int] = {}
        """Through which step it is recorded that a lane of this generation had its own plan."""

        self.confirmed_through = history.confirmed_through
        """Last step that a rank has reported with the plan that it has in the ledger."""

        self._splits: list[AloneSteps] = []
        self._note_splits(history.splits)
        self.group: Aggregator | None = None
        """The reports of the generation."""

        self._now = now
        if history.membership is not None:
            first = max(history.membership.first_step, Step(history.closed_through + 1))
            self.group = self._collecting(history.membership, first, resumed=True)

    @property
    def generation(self) -> Generation:
        """The newest generation; 0: none has begun."""
        return self.membership.generation if self.membership else NO_GENERATION

    @property
    def newest_plan(self) -> Plan:
        """The plan of the last sealed step, and of those after it as far as is known."""
        return self.book.newest

    @property
    def floor(self) -> Step:
        """The first step whose plan a worker may need; see `past.floor_of`."""
        return past.floor_of(self.cursors, self.sealed_through)

    def move_cursors(self, step: Step, cursors: Cursors) -> Cursors:
        """Take in lanes' places after `step`; return those that are newer than what was known."""
        newer = {
            lane: places
            for lane, places in cursors.items()
            if lane not in self.cursors or self.cursors[lane][0] <= step
        }
        self.cursors.update((lane, (Step(step + 1), places)) for lane, places in newer.items())
        return newer

    def draft(self, *, through: int = -1, observed_through: int = -1) -> Draft:
        """Begin decisions that come after what has been sealed.

        Args:
            through: seal so far under the plans held.
            observed_through: count the steps up to this one as decided upon.
        """
        draft = Draft(
            self.book,
            sealed_through=self.sealed_through,
            observed_through=self.observed_through,
            newest_version=self.newest_version,
        )
        draft.sealed_through = max(draft.sealed_through, through)
        draft.observe(observed_through)
        return draft

    def sealed(self, draft: Draft) -> None:
        """Go on to what has been committed."""
        self.book, self.newest_version = draft.book, draft.newest_version
        if draft.sealed_through // CARRY_EVERY > self.sealed_through // CARRY_EVERY:
            self.book.forget_before(self.floor)
        self.sealed_through = draft.sealed_through
        self.observed_through = draft.observed_through

    def amendment(self, alone: Iterable[AloneSteps], *, heard_through: int) -> Amendment:
        """Hold what workers composed alone against the plans; see `controller.amends.amend`."""
        # Workers that are gone heard of a plan, too, where ranks or other lanes had it.
        heard_through = max(heard_through, self.confirmed_through, *self.split_through.values(), -1)
        return amend(
            self.book,
            alone,
            generation=self.generation,
            heard_through=heard_through,
            sealed_through=self.sealed_through,
            newest_version=self.newest_version,
            split_through=self.split_through,
        )

    def amended(self, amendment: Amendment) -> None:
        """Go on to what has been committed."""
        self.book = amendment.book
        self.newest_version = max(self.newest_version, self.book.newest.version)
        self._note_splits(amendment.splits)

    def confirm(self, step: Step, versions: Set[int]) -> Set[int]:
        """Take in with which plans ranks trained a step; return those that it has not here."""
        planned = self.book.plan_at(step).version
        if planned in versions:
            self.confirmed_through = max(self.confirmed_through, step)
        return versions - {planned, *(each.plan_version for each in self._splits_at(step))}

    def told_by_ranks(self) -> AloneSteps | None:
        """Return the next steps that all ranks trained with one plan, older than the ledger's.

        The workers that composed them alone may be dead. What is reported is the newest plan among
        a rank's lanes; steps before, whose reports were lost, had it too if it was theirs already.
        """
        reported = self.group.trained_with() if self.group is not None else iter(())
        if (beginning := next(reported, None)) is None:
            return None
        first, version = beginning
        is_older = 1 <= version < self.book.plan_at(first).version
        if not is_older or self._splits_at(first):
            return None
        alike = takewhile(lambda each: each[1] == version, reported)
        last = max((step for step, _ in alike), default=first)
        known = Step(self.confirmed_through)
        if 0 <= known < first and self.book.plan_at(known).version == version:
            first = Step(known + 1)
        return AloneSteps(
            first_step=first,
            last_step=last,
            plan_version=version,
            lanes=tuple(Lane(lane) for lane in range(self.spec.lanes)),
        )

    @property
    def trained_by_all(self) -> int:
        """The last step that every rank of the generation has reported; -1: a rank is missing."""
        return self.group.reported_by_all if self.group is not None else -1

    def _splits_at(self, step: Step) -> list[AloneSteps]:
        """Return what lanes had of their own in a step."""
        return [each for each in self._splits if each.first_step <= step <= each.last_step]

    def _note_splits(self, splits: Sequence[AloneSteps]) -> None:
        self._splits.extend(splits)
        for split in splits:
            for lane in split.lanes:
                self.split_through[lane] = max(self.split_through.get(lane, -1), split.last_step)

    def next_membership(
        self,
        *,
        world_size: int,
        first_step: Step,
        attempt_ids: Mapping[Rank, str],
        cursors: Cursors,
        cursor_steps: Mapping[Lane, Step],
    ) -> Membership:
        """Return the generation after this one.

        Raises:
            Disagreement: it begins where neither a checkpoint nor the ledger knows the way.
        """
        lost = [lane for lane, step in cursor_steps.items() if step == 0 and first_step > 0]
        if lost and first_step > self.sealed_through + 1:
            raise Disagreement(
                f"the ranks resume at step {first_step}, but no rank's checkpoint holds a cursor "
                f"of lane {lost[0]} and this ledger knows plans through step {self.sealed_through} "
                "only; resume with the ledger of that run"
            )
        return Membership(
            generation=Generation(self.generation + 1),
            world_size=world_size,
            first_step=first_step,
            attempt_ids=attempt_ids,
            cursors=cursors,
            cursor_steps=cursor_steps,
        )

    def begun(self, membership: Membership, book: PlanBook) -> None:
        """Go on with a generation that has begun."""
        self.membership = membership
        self.book = book
        self.split_through, self._splits = {}, []
        self.confirmed_through = -1
        self.cursors = {
            lane: (membership.cursor_steps[lane], places)
            for lane, places in membership.cursors.items()
        }
        self.group = self._collecting(membership, membership.first_step)

    def next_event(self, told: Told | None) -> tuple[PlanEvent, Told]:
        """Return what a worker must hear after what it was `told`; None: it knows nothing."""
        if self.membership is None:
            silent = Told(generation=NO_GENERATION, plan_version=0, sealed_through=-1)
            return PlanEvent(generation=NO_GENERATION, plans=(), sealed_through=-1), silent
        reset = told is None or told.generation != self.generation
        event = PlanEvent(
            generation=self.generation,
            plans=self._plans_from(self.floor) if reset else self._plans_after(told),
            sealed_through=self.sealed_through,
            reset=reset,
        )
        return event, Told(
            generation=self.generation,
            plan_version=self.newest_plan.version,
            sealed_through=self.sealed_through,
        )

    def _plans_from(self, step: Step) -> tuple[Plan, ...]:
        later = (plan for plan in self.book.plans if plan.first_step > step)
        return (past.plan_from(self.book, step), *later)

    def _plans_after(self, told: Told | None) -> tuple[Plan, ...]:
        version = told.plan_version if told is not None else 0
        return tuple(plan for plan in self.book.plans if plan.version > version)

    def _collecting(
        self, membership: Membership, first_step: Step, *, resumed: bool = False
    ) -> Aggregator:
        return Aggregator(
            self.spec,
            generation=membership.generation,
            world_size=membership.world_size,
            first_step=first_step,
            now=self._now,
            resumed=resumed,
        )
