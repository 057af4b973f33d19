"""Decisions on their way to the ledger: what a group of closed steps comes to."""

from __future__ import annotations

from collections.abc import Sequence

from controller import history as past
from controller.ledger_schema import Entry, plan_entry, seal_entry
from protos.planbook import PlanBook
from protos.types import Mixture, Plan, Step


class Draft:
    """The run's plans with those that are being decided; nobody hears of it before its commit.

    Steps that are closed together are committed together: one seal, one write to the disk.
    """

    def __init__(
        self, book: PlanBook, *, sealed_through: int, observed_through: int, newest_version: int
    ) -> None:
        self.book = book
        """The run's own, until there is a plan that the run does not have yet."""

        self.sealed_through = sealed_through
        self.observed_through = observed_through
        self.newest_version = newest_version
        """The highest number that a plan ever had."""

        self.entries: list[Entry] = []
        self._sealed_before = sealed_through
        self._is_copy = False

    @property
    def in_force(self) -> Mixture:
        """The mixture of the last step that is sealed, or will be."""
        return self.book.newest.mixture

    def seal(self, target: Step, mixture: Mixture, reasons: Sequence[str]) -> None:
        """Have `mixture` hold from `target` on, unless it does already, and seal through there."""
        if mixture != self.in_force:
            self._add(mixture, target, reasons)
        self.sealed_through = max(self.sealed_through, target)

    def observe(self, step: int) -> None:
        """Count a step as decided upon."""
        self.observed_through = max(self.observed_through, step)

    def seal_record(self) -> Entry:
        """Return the record of the seal; it comes after all other entries."""
        carry = None
        if past.crosses_carry_snapshot(self._sealed_before, self.sealed_through):
            carry = self.book.carry(Step(self.sealed_through + 1))
        return seal_entry(
            self.sealed_through, observed_through=self.observed_through, carry_after=carry
        )

    def _add(self, mixture: Mixture, first_step: Step, reasons: Sequence[str]) -> None:
        if not self._is_copy:
            self.book, self._is_copy = self.book.copy(), True
        self.newest_version += 1
        plan = Plan(
            version=self.newest_version,
            first_step=first_step,
            mixture=mixture,
            carry_q32=tuple(self.book.carry(first_step).tolist()),
        )
        self.book.add(plan)
        self.entries.append(plan_entry(plan, reason="; ".join(reasons)))
