"""What a worker composed without the controller's word: kept as it was, and said as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from protos.planbook import PlanBook
from protos.types import AloneSteps, Lane, Step

MOST_SAID = 256
"""So many stretches are said in a beat at most: the newest ones."""


@dataclass(slots=True)
class _Stretch:
    """Consecutive steps that were composed alone."""

    first: Step
    last: Step
    book: PlanBook
    """The plans that they were composed with."""


@dataclass(slots=True)
class _Range:
    first: Step
    last: Step
    plan_version: int


class Alone:
    """The steps of one generation that a worker composed without their seal. Its owner guards it.

    A step is composed once: what one stream got of it all others get, whatever was heard since.
    Else the halves of a lane that two ranks share would not fit, and no plan describe the step.
    """

    def __init__(self) -> None:
        self._stretches: list[_Stretch] = []
        self._is_open = False
        """Whether no plan was heard since the last stretch began."""

        self._lanes: defaultdict[Lane, list[_Range]] = defaultdict(list)

    def book_at(self, step: Step) -> PlanBook | None:
        """Return the plans that a step was composed with; None: it was not composed alone."""
        for stretch in reversed(self._stretches):
            if stretch.first <= step <= stretch.last:
                return stretch.book
        return None

    def next_after(self, step: Step) -> Step | None:
        """Return the first step after `step` that was composed alone; None: there is none."""
        firsts = [stretch.first for stretch in self._stretches if stretch.first > step]
        return min(firsts, default=None)

    def compose(self, step: Step, lanes: Iterable[Lane], plans: PlanBook) -> PlanBook:
        """Note that lanes get a step alone; return the plans for it, which are `plans` or older."""
        book = self.book_at(step)
        if book is None:
            book = self._extend(step, plans)
        version = book.plan_at(step).version
        for lane in lanes:
            ranges = self._lanes[lane]
            if ranges and ranges[-1].last == step - 1 and ranges[-1].plan_version == version:
                ranges[-1].last = step
            elif not any(each.first <= step <= each.last for each in ranges):
                ranges.append(_Range(step, step, version))
        return book

    def _extend(self, step: Step, plans: PlanBook) -> PlanBook:
        newest = self._stretches[-1] if self._stretches else None
        if newest is None or not self._is_open or newest.last != step - 1:
            # A copy: what is heard later must not change these steps.
            newest = _Stretch(step, step, plans.copy())
            self._stretches.append(newest)
            self._is_open = True
        newest.last = step
        return newest.book

    def heard_plans(self) -> None:
        """Note that the plans held have changed: steps after this are composed with those."""
        self._is_open = False

    def forget_before(self, step: Step) -> None:
        """Drop the plans of steps that no stream asks for any more; they are still said."""
        self._stretches = [stretch for stretch in self._stretches if stretch.last >= step]

    def said(self) -> tuple[AloneSteps, ...]:
        """Return what was composed alone, lanes that went alike together."""
        together: defaultdict[tuple[Step, Step, int], list[Lane]] = defaultdict(list)
        for lane, ranges in sorted(self._lanes.items()):
            for each in ranges:
                together[each.first, each.last, each.plan_version].append(lane)
        return tuple(
            AloneSteps(first_step=first, last_step=last, plan_version=version, lanes=tuple(lanes))
            for (first, last, version), lanes in sorted(together.items())[-MOST_SAID:]
        )
