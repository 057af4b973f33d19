"""The ranks' reports of a generation: checked, kept apart by step, added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from protos.errors import InvalidMessage, StaleGeneration
from protos.slots import lanes_of, rank_slots
from protos.spec import RunSpec
from protos.types import Cursors, Generation, Mixture, Rank, Step, StepReport

Number = TypeVar("Number", np.int64, np.float64)

MAX_DEGRADED_STEPS_AHEAD = 100_000
"""How far beyond the last seal a rank can have got without the controller."""

RESEND_S = 2.0
"""After a restart a rank that has been heard may take so long to send earlier reports again."""

_NORMS = ("weight_norms", "update_norms")

_LOSS_SLACK = 1e-6
"""Nats a token by which rounding may take a loss below 0."""


@dataclass(eq=False, slots=True)
class StepReports:
    """The reports of one step."""

    first_heard_s: float
    by_rank: dict[Rank, StepReport] = field(default_factory=dict)
    num_norms: dict[str, tuple[Rank, int]] = field(default_factory=dict)
    """How many norms of each kind a rank sent, and which: all send as many."""


class Aggregator:
    """Collects the reports of one generation; its steps are closed one after the other.

    A report of a closed step is late: it changes no decision.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        generation: Generation,
        world_size: int,
        first_step: Step,
        now: Callable[[], float],
        resumed: bool = False,
    ) -> None:
        """Begin to collect.

        Args:
            spec: the run's settings.
            generation: of the ranks.
            world_size: how many they are.
            first_step: the first that is not closed yet.
            now: seconds, growing.
            resumed: another controller collected before; reports that it had are sent again.
        """
        self.generation = generation
        self.world_size = world_size
        self.next_step = first_step
        """The first step that is not closed."""

        self._spec = spec
        self._now = now
        self._pending: dict[Step, StepReports] = {}
        self._newest: dict[Rank, Step] = {}
        self._first_heard: dict[Rank, tuple[Step, float]] | None = {} if resumed else None
        """Of each rank, if it is `resumed`: the step and when."""

    def add(self, report: StepReport, *, sealed_through: int) -> bool:
        """Take a report in; return False if it was known already or comes too late.

        Raises:
            StaleGeneration: it is of another generation.
            InvalidMessage: a field cannot be right; nothing has changed.
        """
        self._check(report, sealed_through)
        if report.step < self.next_step:
            return False
        if self._first_heard is not None and report.rank not in self._first_heard:
            self._first_heard[report.rank] = report.step, self._now()
        self._newest[report.rank] = max(self._newest.get(report.rank, report.step), report.step)
        reports = self._pending.get(report.step)
        if reports is None:
            reports = self._pending[report.step] = StepReports(first_heard_s=self._now())
        if report.rank in reports.by_rank:
            return False
        self._check_norms(report, reports)
        for name in _NORMS:
            if norms := getattr(report, name):
                reports.num_norms[name] = report.rank, len(norms)
        reports.by_rank[report.rank] = report
        return True

    @property
    def num_waiting(self) -> int:
        """How many steps have reports and are not closed."""
        return len(self._pending)

    def is_complete(self) -> bool:
        """Say whether every rank has reported the next step."""
        reports = self._pending.get(self.next_step)
        return reports is not None and len(reports.by_rank) == self.world_size

    def is_passed(self) -> bool:
        """Say whether every rank has reported a step after the next one.

        A rank sends its reports in the order of the steps and drops those that it cannot send, so
        what is missing of the next step then will never come.
        """
        newest = self._newest
        passed = len(newest) == self.world_size and min(newest.values()) > self.next_step
        return passed and not self._may_come_again()

    def _may_come_again(self) -> bool:
        """Say whether reports of the next step may be under way that a dead controller had."""
        if not self._first_heard:
            return False
        newest_step = max(step for step, _ in self._first_heard.values())
        last_heard_s = max(heard_s for _, heard_s in self._first_heard.values())
        return self.next_step < newest_step and self._now() - last_heard_s < RESEND_S

    @property
    def reported_by_all(self) -> int:
        """The last step that every rank has reported, or one after it; -1: a rank is missing."""
        return min(self._newest.values()) if len(self._newest) == self.world_size else -1

    def trained_with(self) -> Iterator[tuple[Step, int]]:
        """Yield the next steps that all ranks reported with one and the same plan, and the plan."""
        step = self.next_step
        while (found := self._pending.get(step)) and len(found.by_rank) == self.world_size:
            versions = {report.plan_version for report in found.by_rank.values()}
            if len(versions) > 1:
                return
            yield step, versions.pop()
            step = Step(step + 1)

    def waiting_since_s(self) -> float | None:
        """Return when the first report came of the next step or a later one; None: none has."""
        return min((reports.first_heard_s for reports in self._pending.values()), default=None)

    def first_reported(self) -> Step | None:
        """Return the first step that is not closed and has a report; None: there is none."""
        return min(self._pending, default=None)

    def close(self) -> list[StepReport]:
        """Close the next step; return its reports in the order of ranks."""
        reports = self._pending.pop(self.next_step, None)
        self.next_step = Step(self.next_step + 1)
        if reports is None:
            return []
        return [reports.by_rank[rank] for rank in sorted(reports.by_rank)]

    def skip_to(self, step: Step) -> None:
        """Close all steps before `step`, which nobody has reported."""
        assert not any(pending < step for pending in self._pending)
        self.next_step = max(self.next_step, step)

    def _check(self, report: StepReport, sealed_through: int) -> None:
        if report.generation != self.generation:
            raise StaleGeneration(
                f"rank {report.rank} reports step {report.step} in generation "
                f"{report.generation}, but generation {self.generation} has begun since; join again"
            )
        who = f"report of rank {report.rank}, step {report.step}"
        if not 0 <= report.rank < self.world_size:
            raise InvalidMessage(f"{who}: rank must be in 0..{self.world_size - 1}")
        limit = sealed_through + (MAX_DEGRADED_STEPS_AHEAD if report.degraded else 0)
        if not 0 <= report.step <= limit:
            raise InvalidMessage(
                f"{who}: step lies in the future, plans are final through step {sealed_through}"
            )
        _check_numbers(report, self._spec, self.world_size, who)
        _check_cursors(report, self._spec, self.world_size, who)

    def _check_norms(self, report: StepReport, reports: StepReports) -> None:
        for name, (other, there) in reports.num_norms.items():
            here = len(getattr(report, name))
            if here and here != there:
                raise InvalidMessage(
                    f"report of rank {report.rank}, step {report.step}: {name} has {here} numbers, "
                    f"but rank {other} sent {there}"
                )


def _check_numbers(report: StepReport, spec: RunSpec, world_size: int, who: str) -> None:
    num_domains = spec.num_domains
    per_domain = (
        ("sequences", report.sequences),
        ("tokens", report.tokens),
        ("loss_sum", report.loss_sum),
    )
    for name, array in per_domain:
        _check_array(name, array, (num_domains,), who)
    for name, array in per_domain[:2]:
        if array.min() < 0:
            raise InvalidMessage(f"{who}: {name} must not be negative, got {array.tolist()}")
    slots = rank_slots(report.rank, world_size=world_size, global_sequences=spec.global_sequences)
    # Each alone first: large ones could add up to little.
    if (report.sequences > len(slots)).any() or report.sequences.sum() > len(slots):
        raise InvalidMessage(
            f"{who}: sequences {report.sequences.tolist()} are more than the {len(slots)} slots "
            "that the rank has"
        )
    if (report.sequences * spec.sequence_length - report.tokens).min() < 0:
        raise InvalidMessage(
            f"{who}: tokens {report.tokens.tolist()} are more than sequences "
            f"{report.sequences.tolist()} of {spec.sequence_length} tokens hold"
        )
    if (report.loss_sum + _LOSS_SLACK * report.tokens).min() < 0:
        raise InvalidMessage(
            f"{who}: loss_sum must not be negative, got {report.loss_sum.tolist()}"
        )
    _check_optional(report, num_domains, who)
    if report.alignment_part is not None:
        _check_array("alignment_part", report.alignment_part, (num_domains, num_domains), who)
    if not 0 <= report.alignment_share <= 1:
        raise InvalidMessage(
            f"{who}: alignment_share must be in 0..1, got {report.alignment_share}"
        )
    for name in ("step_s", "data_wait_s", "probe_s"):
        _check_measure(name, getattr(report, name), who)
    for name in _NORMS:
        for norm in getattr(report, name):
            _check_measure(name, norm, who)


def _check_optional(report: StepReport, num_domains: int, who: str) -> None:
    """Check what only some policies need."""
    for name in ("validation_loss", "excess_sum", "part_square_norms", "num_parts"):
        array = getattr(report, name)
        if array is None:
            continue
        _check_array(name, array, (num_domains,), who)
        if (array < 0).any():
            raise InvalidMessage(f"{who}: {name} must not be negative, got {array.tolist()}")
    norms, parts = report.part_square_norms, report.num_parts
    if (norms is None) != (parts is None):
        raise InvalidMessage(f"{who}: part_square_norms and num_parts must come together")
    if parts is not None and (parts > report.sequences).any():
        raise InvalidMessage(
            f"{who}: num_parts {parts.tolist()} are more than sequences {report.sequences.tolist()}"
        )


def _check_array(
    name: str,
    array: NDArray[np.int64] | NDArray[np.float64],
    shape: tuple[int, ...],
    who: str,
) -> None:
    if array.shape != shape:
        raise InvalidMessage(f"{who}: {name} must have the shape {shape}, got {array.shape}")
    # Whole numbers always are.
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidMessage(f"{who}: {name} must be finite, got {array.tolist()}")


def _check_measure(name: str, value: float, who: str) -> None:
    if not math.isfinite(value) or value < 0:
        raise InvalidMessage(f"{who}: {name} must be finite and not negative, got {value}")


def _check_cursors(report: StepReport, spec: RunSpec, world_size: int, who: str) -> None:
    slots = rank_slots(report.rank, world_size=world_size, global_sequences=spec.global_sequences)
    own = set(lanes_of(slots, slots_per_lane=spec.slots_per_lane))
    for lane, places in report.cursors.items():
        if lane not in own:
            raise InvalidMessage(f"{who}: it holds a cursor of lane {lane}, which is another's")
        if places.shape != (spec.num_domains, 3):
            raise InvalidMessage(
                f"{who}: the cursor of lane {lane} must have the shape "
                f"{(spec.num_domains, 3)}, got {places.shape}"
            )


def add_up(
    reports: list[StepReport], spec: RunSpec, *, step: Step, planned: Mixture, world_size: int
) -> StepObservation:
    """Add the reports of a step up; those that are missing count as nothing."""
    num_domains = spec.num_domains
    zeros = np.zeros(num_domains, dtype=np.int64)
    return StepObservation(
        step=step,
        num_steps=spec.num_steps,
        planned=np.asarray(planned.shares),
        sequences=sum((report.sequences for report in reports), zeros),
        tokens=sum((report.tokens for report in reports), zeros),
        loss_sum=sum((report.loss_sum for report in reports), np.zeros(num_domains)),
        alignment=_alignment(reports),
        weight_norms=_mean_norms([report.weight_norms for report in reports]),
        update_norms=_mean_norms([report.update_norms for report in reports]),
        num_missing_ranks=world_size - len(reports),
        validation_loss=_mean_validation(reports),
        excess_sum=_sum_of_all([report.excess_sum for report in reports]),
        part_square_norms=_sum_of_all([report.part_square_norms for report in reports]),
        num_parts=_sum_of_all([report.num_parts for report in reports]),
    )


def _mean_validation(reports: list[StepReport]) -> NDArray[np.float64] | None:
    """Return the mean of the ranks that evaluated; one of them is enough."""
    sent = [report.validation_loss for report in reports if report.validation_loss is not None]
    return np.mean(sent, axis=0) if sent else None


def _sum_of_all(arrays: list[NDArray[Number] | None]) -> NDArray[Number] | None:
    """Return the sum; None unless all have sent: it is held against sums over all of them."""
    sent = [array for array in arrays if array is not None]
    if not sent or len(sent) < len(arrays):
        return None
    total: NDArray[Number] = np.sum(sent, axis=0)
    return total


def _alignment(reports: list[StepReport]) -> NDArray[np.float64] | None:
    """Sum the parts; what is missing of the sketch only makes the estimate noisier."""
    sent = [
        (report.alignment_part, report.alignment_share)
        for report in reports
        if report.alignment_part is not None and report.alignment_share > 0
    ]
    if not sent:
        return None
    total: NDArray[np.float64] = np.sum([part for part, _ in sent], axis=0)
    share = math.fsum(share for _, share in sent)
    # Shares such as three thirds do not add up to 1 exactly.
    return total if math.isclose(share, 1.0, rel_tol=1e-9) else total / share


def _mean_norms(sent: list[tuple[float, ...]]) -> NDArray[np.float64]:
    rows = [norms for norms in sent if norms]
    return np.mean(np.asarray(rows, dtype=np.float64), axis=0) if rows else np.zeros(0)


def cursors_after(reports: list[StepReport]) -> Cursors:
    """Return the lanes' places after the step; ranks that share a lane hold the same place."""
    return {lane: places for report in reports for lane, places in report.cursors.items()}
