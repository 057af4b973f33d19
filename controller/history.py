"""What a ledger says of the run so far: all that a controller needs to go on from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from controller.amends import Amendments, split_of
from controller.ledger import Ledger
from controller.ledger_schema import (
    CARRY_EVERY,
    Entry,
    Kind,
    Row,
    StepRecord,
    cursors_of,
    membership_of,
    plan_entry,
    plan_of,
    quarantine_of,
    step_record_of,
)
from controller.membership import Membership
from controller.metrics import Totals
from protos.apportion import no_carry
from protos.errors import ConfigError, Disagreement
from protos.failpoints import DurableWrite
from protos.planbook import PlanBook
from protos.spec import RunSpec
from protos.types import AloneSteps, Cursors, Lane, Mixture, Places, Plan, Quarantine, Step

_START = DurableWrite("ledger.run", "the start of a controller is committed")


class LedgerRows(Protocol):
    """A ledger as it is read: `Ledger`, or `LedgerView` where another process writes it."""

    def rows(
        self,
        *kinds: Kind,
        min_step: int | None = None,
        max_step: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Row]:
        """Yield rows; see `Ledger.rows`."""


LaneCursors = dict[Lane, tuple[Step, Places]]
"""Each lane's newest known place, and the step before which it stands."""


@dataclass(kw_only=True, slots=True)
class Steering:
    """Whether an operator holds the wheel."""

    override: Mixture | None = None
    frozen: bool = False

    def as_entry(self) -> Entry:
        """Record it."""
        shares = None if self.override is None else list(self.override.shares_q32)
        return Entry(
            kind=Kind.CONTROL, step=-1, body={"override_q32": shares, "frozen": self.frozen}
        )


@dataclass(kw_only=True, slots=True)
class History:
    """A run as its ledger has it."""

    book: PlanBook
    """The newest plans; see `book_from` for older ones."""

    observed_through: int
    sealed_through: int
    membership: Membership | None
    closed_through: int
    """Last step of that membership that is closed; -1: none."""

    cursors: LaneCursors
    steering: Steering
    totals: Totals
    quarantines: tuple[Quarantine, ...] = ()
    workers: frozenset[str] = frozenset()
    """Those that were enlisted last."""

    wanted_workers: int = 0
    """How many loader workers were wanted last; 0: nobody has said."""

    newest_version: int = 1
    """The highest number that a plan ever had, void or not."""

    confirmed_through: int = -1
    """Last step of that membership that ranks reported with the plan that it has here."""

    splits: tuple[AloneSteps, ...] = ()
    """What lanes of that membership had of their own; see `controller.amends`."""

    snapshots: list[tuple[Step, Path]] = field(default_factory=list)
    """Newest first: the step after which the policy was saved, and where."""


def begin(ledger: Ledger, spec: RunSpec, initial: Mixture, settings: Mapping[str, object]) -> None:
    """Record that a controller starts, and at the first start the plan of step 0.

    Raises:
        ConfigError: the ledger belongs to a run whose data has another order.
    """
    order = {"order_sha256": spec.order_sha256(), "run": spec.run_id}
    # The ledger sorts the keys of what it keeps, and the order of the domains matters.
    body = {**order, "domains": list(spec.domains), "settings": dict(settings)}
    entries = [Entry(kind=Kind.RUN, step=-1, body=body)]
    known = ledger.newest(Kind.RUN)
    if known is None:
        carry = no_carry(spec.num_domains).tolist()
        plan = Plan(version=1, first_step=Step(0), mixture=initial, carry_q32=tuple(carry))
        entries.append(plan_entry(plan, reason="the run begins"))
    else:
        for name, value in order.items():
            is_same_order = name == "order_sha256" and spec.has_order(known.body[name])
            if known.body[name] != value and not is_same_order:
                raise ConfigError(
                    f"the ledger {ledger.path} belongs to another run: its {name} is "
                    f"{known.body[name]}, this run's is {value} (seed, domains, batch, index or "
                    "tokenizer differ); give this run another `out`"
                )
    with _START.around():
        ledger.commit(entries)


def read_history(ledger: Ledger, spec: RunSpec) -> History:
    """Read what a controller needs to go on; `begin` has been called on the ledger."""
    seal = ledger.newest(Kind.SEAL)
    sealed_through = seal.step if seal is not None else -1
    generation = ledger.newest(Kind.GENERATION)
    membership = membership_of(generation) if generation is not None else None
    cursors: LaneCursors = {}
    if generation is not None and membership is not None:
        cursors = _newest_cursors(ledger, membership, after_seq=generation.seq)
    step = ledger.newest(Kind.STEP)
    closed = [
        row.step
        for row in (step, ledger.newest(Kind.SKIP))
        if row is not None
        and membership is not None
        and row.body["generation"] == membership.generation
    ]
    control = ledger.newest(Kind.CONTROL)
    steering = Steering()
    if control is not None:
        shares = control.body["override_q32"]
        steering.override = None if shares is None else Mixture(tuple(shares))
        steering.frozen = control.body["frozen"]
    wanted, newest_plan = ledger.newest(Kind.WORKERS), ledger.newest(Kind.PLAN)
    amendments = read_amendments(ledger)
    splits: list[AloneSteps] = []
    if membership is not None:
        splits = amendments.splits_of(membership.generation)
    return History(
        book=book_from(ledger, floor_of(cursors, sealed_through), spec),
        observed_through=seal.body["observed_through"] if seal is not None else -1,
        sealed_through=sealed_through,
        membership=membership,
        closed_through=max(closed, default=-1),
        cursors=cursors,
        steering=steering,
        totals=Totals.from_json(step.body["totals"]) if step is not None else Totals(),
        quarantines=tuple(quarantine_of(row) for row in ledger.rows(Kind.QUARANTINE)),
        workers=_enlisted(ledger),
        wanted_workers=wanted.body["wanted"] if wanted is not None else 0,
        newest_version=newest_plan.body["version"] if newest_plan is not None else 1,
        confirmed_through=_confirmed_through(ledger, membership, amendments),
        splits=tuple(splits),
        snapshots=[
            (Step(row.step), Path(row.body["path"]))
            for row in ledger.rows(Kind.SNAPSHOT, newest_first=True)
        ],
    )


def _confirmed_through(
    ledger: Ledger, membership: Membership | None, amendments: Amendments
) -> int:
    """Return the newest step's number if ranks had its plan; -1: they had not, or it is old."""
    row = ledger.newest(Kind.STEP)
    if row is None or membership is None or row.body["generation"] != membership.generation:
        return -1
    began = ledger.rows(Kind.PLAN, max_step=row.step, newest_first=True)
    plan = next(each for each in began if amendments.holds(each))
    return row.step if plan.body["version"] in row.body["executed_plan_versions"] else -1


def _enlisted(ledger: Ledger) -> frozenset[str]:
    there: set[str] = set()
    for row in ledger.rows(Kind.EVENT):
        if row.body["event"] == "worker enlisted":
            there.add(row.body["worker"])
        elif row.body["event"] in ("worker lost", "worker left"):
            there.discard(row.body["worker"])
    return frozenset(there)


def floor_of(cursors: LaneCursors, sealed_through: int) -> Step:
    """Return the first step whose plan a worker may need: where the hindmost lane stands.

    At most the last sealed one: the next plan may begin after it, and a worker that was told of
    the present one as if it began there, too, would refuse it.
    """
    hindmost = min((step for step, _ in cursors.values()), default=Step(0))
    return Step(max(min(hindmost, sealed_through), 0))


def read_amendments(ledger: LedgerRows, *, as_of: int | None = None) -> Amendments:
    """Return what holds instead of plans that nobody followed; see `Amendments`."""
    return Amendments(ledger.rows(Kind.AMEND, Kind.GENERATION), as_of=as_of)


def book_from(
    ledger: LedgerRows,
    step: Step,
    spec: RunSpec,
    *,
    through: Step | None = None,
    as_of: int | None = None,
) -> PlanBook:
    """Return the plans in force from `step` on, beginning a few steps before it.

    At most `CARRY_EVERY` steps, but for plans that were found void. Plans that begin after
    `through` are left out, and so is what came after the ledger's row `as_of`.
    """
    amendments = read_amendments(ledger, as_of=as_of)
    start, carry = Step(0), None
    for row in ledger.rows(Kind.SEAL, max_step=step - 1, newest_first=True):
        if "carry_q32" in row.body and amendments.holds(row):
            start, carry = Step(row.step + 1), row.body["carry_q32"]
            break
    book = PlanBook(global_sequences=spec.global_sequences)
    began = ledger.rows(Kind.PLAN, max_step=start, newest_first=True)
    plan = plan_of(next(row for row in began if amendments.holds(row)))
    if carry is not None:
        plan = Plan(
            version=plan.version,
            first_step=start,
            mixture=plan.mixture,
            carry_q32=tuple(carry),
        )
    book.add(plan)
    for row in ledger.rows(Kind.PLAN, min_step=start + 1, max_step=through):
        if amendments.holds(row):
            book.add(plan_of(row))
    return book


def counts_of_their_own(
    ledger: LedgerRows, spec: RunSpec, *, first: int = 0, last: int | None = None
) -> dict[int, dict[Lane, NDArray[np.int64]]]:
    """Return, by step and lane, the [domains] counts of what lanes had other plans for than all.

    They are counts of a global batch: a lane had its part of that one. Steps from `first` through
    `last` (None: all); see `controller.amends`.
    """
    amendments = read_amendments(ledger)
    counts: dict[int, dict[Lane, NDArray[np.int64]]] = {}
    for row in ledger.rows(Kind.AMEND):
        split = split_of(row)
        if split is None:
            continue
        end = split.last_step if last is None else min(split.last_step, last)
        steps = range(max(split.first_step, first), end + 1)
        if not steps:
            continue
        plans = ledger.rows(Kind.PLAN, newest_first=True)
        written = next(each.seq for each in plans if each.body["version"] == split.plan_version)
        # As those had them who had heard of no later plan.
        book = book_from(ledger, Step(steps.start), spec, as_of=written)
        for step in steps:
            for lane in split.lanes:
                if amendments.version_of(Step(step), lane) == split.plan_version:
                    counts.setdefault(step, {})[lane] = book.counts(Step(step))
    return counts


def check_wound(ledger: LedgerRows, cursor_steps: Mapping[Lane, Step], first_step: Step) -> None:
    """Refuse to wind a lane over steps in which it had a plan of its own, which workers know not.

    Raises:
        Disagreement: a lane would be.
    """
    amendments = read_amendments(ledger)
    if not amendments.has_own:
        return
    for lane, known in cursor_steps.items():
        step = amendments.first_of_its_own(lane, range(known, first_step))
        if step is not None:
            raise Disagreement(
                f"the ranks resume at step {first_step}, but lane {lane} is known at step {known} "
                f"only, and in step {step} it had another plan than the other lanes; resume from a "
                "checkpoint that holds the lane's cursor, or from one before that step"
            )


def plan_from(book: PlanBook, step: Step) -> Plan:
    """Return the plan in force at `step` as if it began there, with the carry into `step`."""
    plan = book.plan_at(step)
    carry = tuple(book.carry(step).tolist())
    return Plan(version=plan.version, first_step=step, mixture=plan.mixture, carry_q32=carry)


def crosses_carry_snapshot(before: int, through: int) -> bool:
    """Say whether a seal from `before` to `through` must hold the carry."""
    return (through + 1) // CARRY_EVERY > (before + 1) // CARRY_EVERY


def cursors_before(ledger: LedgerRows, step: Step, spec: RunSpec) -> LaneCursors:
    """Return each lane's newest known place at or before `step`; lanes that have none are left out.

    Where a step was trained more than once, what was written last counts.
    """
    known: LaneCursors = {}
    for row in ledger.rows(Kind.CURSORS, max_step=step - 1, newest_first=True):
        _take(known, cursors_of(row), Step(row.step + 1))
        if len(known) == spec.lanes:
            break
    return known


def records_after(ledger: Ledger, step: int) -> Iterator[StepRecord]:
    """Yield the steps after `step` that the policy observed, in their order."""
    for row in ledger.rows(Kind.STEP, min_step=step + 1):
        if row.body["to_policy"]:
            yield step_record_of(row)


def shadow_records_after(ledger: Ledger, step: int) -> Iterator[tuple[StepRecord, Step]]:
    """Yield the steps after `step` that shadows observed, and the step they then proposed for."""
    targets = {
        row.step: Step(row.body["proposed_step"])
        for row in ledger.rows(Kind.SHADOW, min_step=step + 1)
        if row.body["observed"]
    }
    for row in ledger.rows(Kind.STEP, min_step=step + 1):
        # Once, though a step that was trained again after a resume has two rows.
        target = targets.pop(row.step, None)
        if target is not None:
            yield step_record_of(row), target


def newest_line(rows: Iterable[Row]) -> dict[int, Row]:
    """Return each step's row in the line of training that was not abandoned."""
    steps: dict[int, Row] = {}
    for row in rows:
        if row.kind is Kind.FORK:
            for step in [step for step in steps if step >= row.step]:
                del steps[step]
        elif row.kind is Kind.STEP:
            steps[row.step] = row
    return steps


def _newest_cursors(ledger: Ledger, membership: Membership, *, after_seq: int) -> LaneCursors:
    known: LaneCursors = {}
    for row in ledger.rows(Kind.CURSORS, newest_first=True):
        if row.seq < after_seq or len(known) == len(membership.cursors):
            break
        # A step of the generation before may have been closed after this one began.
        if row.body["generation"] == membership.generation:
            _take(known, cursors_of(row), Step(row.step + 1))
    for lane, places in membership.cursors.items():
        known.setdefault(lane, (membership.cursor_steps[lane], places))
    return known


def _take(known: LaneCursors, cursors: Cursors, step: Step) -> None:
    for lane, places in cursors.items():
        known.setdefault(lane, (step, np.asarray(places)))
