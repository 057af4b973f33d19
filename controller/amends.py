"""Plans that workers did not follow because nobody had told them: what holds instead.

A plan is in the ledger before anybody hears of it. If the controller dies in between, or no worker
can hear it, and that lasts for longer than `degraded_after_s`, workers compose the plan's steps
with the plan before. They say so as soon as they are asked (`PlanEvent.asked`), and from then on
the ledger follows them:

    who was told of the plan's seal      what is recorded
    nobody who can be asked              the plan is void, the one before goes on through the last
                                         step that was composed with it; what had been decided for
                                         later steps is planned again after that
    some workers                         the plan holds, and for the lanes of the others that they
                                         had an older one in these steps; each of them has its own

Rows are never changed: an amendment is a row of its own, and whoever reads the ledger's plans
reads them through `Amendments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from controller.ledger_schema import Entry, Kind, Row, plan_entry
from protos.planbook import PlanBook
from protos.types import AloneSteps, Generation, Lane, Plan, Step


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Amendment:
    """What is to be recorded, and the plans after it."""

    entries: Sequence[Entry]
    """Empty: the ledger and the workers agree."""

    book: PlanBook
    splits: Sequence[AloneSteps]
    """What lanes had of their own, new since the last amendment."""


def amend(
    book: PlanBook,
    alone: Iterable[AloneSteps],
    *,
    generation: Generation,
    heard_through: int,
    sealed_through: int,
    newest_version: int,
    split_through: Mapping[Lane, int],
) -> Amendment:
    """Hold what workers composed alone against the plans that the ledger has.

    Args:
        book: the plans of the ledger, as amended so far.
        alone: what workers composed without a seal.
        generation: the ranks'.
        heard_through: the last seal that a worker was told of; -1: none.
        sealed_through: the last seal in the ledger.
        newest_version: the highest number that a plan of the ledger ever had.
        split_through: through which step it is recorded already that a lane had a plan of its own.
    """
    alone = tuple(alone)
    entries: list[Entry] = []
    void = _in_doubt(book, alone, heard_through)
    if void is not None:
        version, through, plans = void
        body = {"generation": generation, "version": version, "through": through, "lanes": None}
        entries.append(Entry(kind=Kind.AMEND, step=plans[0].first_step, body=body))
        book = book.without_after(version)
        for plan in _planned_again(plans, Step(through + 1), sealed_through):
            newest_version += 1
            again = Plan(
                version=newest_version,
                first_step=plan.first_step,
                mixture=plan.mixture,
                carry_q32=tuple(book.carry(plan.first_step).tolist()),
            )
            if again.mixture != book.newest.mixture:
                book.add(again)
                reason = f"plan {plan.version} again, after steps composed without it"
                entries.append(plan_entry(again, reason=reason))
    splits = [part for each in alone for part in _parts_of_their_own(book, each, split_through)]
    entries += [_split_entry(split, generation) for split in splits]
    return Amendment(entries=entries, book=book, splits=splits)


def _in_doubt(
    book: PlanBook, alone: Sequence[AloneSteps], heard_through: int
) -> tuple[int, Step, list[Plan]] | None:
    """Return the plan that went on, through which step, and the plans that are void for it."""
    beyond = [each for each in alone if each.last_step > heard_through]
    if not beyond:
        return None
    versions = [each.plan_version for each in beyond]
    if heard_through >= book.plans[0].first_step:
        versions.append(book.plan_at(Step(heard_through)).version)
    version = max(versions)
    through = max((each.last_step for each in beyond if each.plan_version == version), default=None)
    plans = [
        plan
        for plan in book.plans[1:]
        if plan.version > version and plan.first_step > heard_through
    ]
    if through is None or not plans or plans[0].first_step > through:
        return None
    return version, through, plans


def _planned_again(plans: Sequence[Plan], first_step: Step, sealed_through: int) -> list[Plan]:
    """Return the plans that hold for sealed steps from `first_step` on, none before it."""
    if first_step > sealed_through:
        return []
    before = [plan for plan in plans if plan.first_step <= first_step]
    later = [plan for plan in plans if plan.first_step > first_step]
    moved = [
        Plan(
            version=plan.version,
            first_step=first_step,
            mixture=plan.mixture,
            carry_q32=plan.carry_q32,
        )
        for plan in before[-1:]
    ]
    return [*moved, *later]


def _parts_of_their_own(
    book: PlanBook, alone: AloneSteps, split_through: Mapping[Lane, int]
) -> Iterator[AloneSteps]:
    """Yield the stretches, lane by lane, in which `book` has another plan than the worker had."""
    known: dict[int, list[Lane]] = {}
    for lane in alone.lanes:
        known.setdefault(split_through.get(lane, -1), []).append(lane)
    for through, lanes in known.items():
        first = max(alone.first_step, Step(through + 1), book.plans[0].first_step)
        for start, end in _stretches_of_another_plan(book, alone, first):
            yield AloneSteps(
                first_step=start,
                last_step=Step(end - 1),
                plan_version=alone.plan_version,
                lanes=tuple(lanes),
            )


def _stretches_of_another_plan(
    book: PlanBook, alone: AloneSteps, first: Step
) -> Iterator[tuple[Step, Step]]:
    """Yield from which step to before which, from `first` on, `book` has another plan."""
    start: Step | None = None
    step, end = first, Step(alone.last_step + 1)
    while step < end:
        if book.plan_at(step).version == alone.plan_version:
            if start is not None:
                yield start, step
            start = None
        elif start is None:
            start = step
        change = book.next_change(step)
        step = end if change is None else min(change, end)
    if start is not None:
        yield start, end


def _split_entry(split: AloneSteps, generation: Generation) -> Entry:
    body = {
        "generation": generation,
        "version": split.plan_version,
        "through": split.last_step,
        "lanes": list(split.lanes),
    }
    return Entry(kind=Kind.AMEND, step=split.first_step, body=body)


def split_of(row: Row) -> AloneSteps | None:
    """Return what lanes had of their own; None: the row says which plans are void."""
    if row.body["lanes"] is None:
        return None
    return AloneSteps(
        first_step=Step(row.step),
        last_step=Step(row.body["through"]),
        plan_version=row.body["version"],
        lanes=tuple(Lane(lane) for lane in row.body["lanes"]),
    )


class Amendments:
    """The amendments of a ledger, or of what it was when its row `as_of` was written."""

    def __init__(self, rows: Iterable[Row], *, as_of: int | None = None) -> None:
        """Read rows of the kinds AMEND and GENERATION; others are passed over."""
        self._as_of = as_of
        self._void: list[Row] = []
        self._splits: list[tuple[Generation, AloneSteps]] = []
        self._begun: list[tuple[Generation, int]] = []
        for row in rows:
            if as_of is not None and row.seq > as_of:
                continue
            if row.kind is Kind.GENERATION:
                self._begun.append((row.body["generation"], row.step))
            elif row.kind is Kind.AMEND:
                split = split_of(row)
                if split is None:
                    self._void.append(row)
                else:
                    self._splits.append((row.body["generation"], split))

    def holds(self, row: Row) -> bool:
        """Say whether a plan, or the carry of a seal, holds."""
        if self._as_of is not None and row.seq > self._as_of:
            return False
        if row.kind is Kind.PLAN:
            version = row.body["version"]
            return not any(
                row.seq < void.seq and version > void.body["version"] for void in self._void
            )
        return not any(row.seq < void.seq and row.step >= void.step for void in self._void)

    def version_of(self, step: Step, lane: Lane) -> int | None:
        """Return the plan that a lane alone had in a step; None: it had that of all.

        What a later generation trained again does not count.
        """
        for generation, split in reversed(self._splits):
            if (
                split.first_step <= step <= split.last_step
                and lane in split.lanes
                and not any(later > generation and begun <= step for later, begun in self._begun)
            ):
                return split.plan_version
        return None

    @property
    def has_own(self) -> bool:
        """Whether some lane ever had a plan of its own."""
        return bool(self._splits)

    def splits_of(self, generation: Generation) -> list[AloneSteps]:
        """Return what lanes had of their own in a generation, in the order of the ledger."""
        return [split for owner, split in self._splits if owner == generation]

    def first_of_its_own(self, lane: Lane, steps: range) -> Step | None:
        """Return the first of some steps in which a lane alone had a plan; None: there is none."""
        own = (step for step in steps if self.version_of(Step(step), lane) is not None)
        return Step(first) if (first := next(own, None)) is not None else None

    def lanes_of_their_own(self, step: Step) -> dict[Lane, int]:
        """Return the plans of the lanes that had another one in a step than the rest."""
        lanes = {lane for _, split in self._splits for lane in split.lanes}
        versions = {lane: self.version_of(step, lane) for lane in sorted(lanes)}
        return {lane: version for lane, version in versions.items() if version is not None}
