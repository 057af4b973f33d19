"""What a ledger says of a run, in the terms of the report and the plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.amends import Amendments
from controller.history import newest_line
from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_head import head_text
from controller.ledger_schema import Kind, Row, StepRecord, plan_of, quarantine_of, step_record_of
from protos.types import Plan, Quarantine

LEDGER = "ledger.sqlite"


def ledger_of(path: Path) -> Path:
    """Return the ledger that `path` is, or that the run in the folder `path` has."""
    return path / LEDGER if path.is_dir() else path


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class RunRecord:
    """A run as its ledger has it; of a step that was trained twice, the newest."""

    num_rows: int
    head: str
    """Number and hash of the ledger's last row; see `controller.ledger_head`."""

    settings: Mapping[str, Any]
    """The run file, as the newest controller read it."""

    order_sha256: str
    """Of all that the order of the data hangs on; empty: the ledger names no run."""

    plans: tuple[Plan, ...]
    """Those that hold; see `controller.amends`."""

    steps: Mapping[int, StepRecord]
    bodies: Mapping[int, Mapping[str, Any]]
    """What the ledger says of each step beside the observation: times, decision, and so on."""

    num_generations: int
    num_forks: int
    quarantines: tuple[Quarantine, ...]
    events: Mapping[str, int]
    """How often each kind of event happened."""

    first_time_s: float

    def loss(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps and, [steps, domains], the losses; NaN where a step had none."""
        steps = sorted(self.steps)
        losses = [self.steps[step].observation.loss for step in steps]
        return np.asarray(steps, dtype=np.int64), np.asarray(losses, dtype=np.float64)

    @property
    def totals(self) -> Mapping[str, Any]:
        """The figures of the whole run, as of its newest step."""
        if not self.bodies:
            return {}
        totals: Mapping[str, Any] = self.bodies[max(self.bodies)].get("totals", {})
        return totals

    def mixture_lag_steps(self) -> int | None:
        """Return how many steps after its newest observation a decision held, at most."""
        lags = [record.proposed_step - step for step, record in self.steps.items()]
        return max(lags, default=None)

    def tokens(self) -> int:
        """Return how many tokens were trained on, in the steps that count."""
        return sum(int(record.observation.tokens.sum()) for record in self.steps.values())


def read_record(path: Path) -> RunRecord:
    """Read a ledger, also while a controller writes it, and check its chain of hashes.

    Raises:
        LedgerError: it is missing or damaged.
    """
    with reading_ledger(path) as database:
        num_rows, row_hash = verify(database, path)
        rows = list(read_rows(database))
    steps = newest_line(rows)
    amendments = Amendments(rows)
    plans = [plan_of(row) for row in _of(rows, Kind.PLAN) if amendments.holds(row)]
    quarantines = {quarantine_of(row) for row in rows if row.kind is Kind.QUARANTINE}
    times = [row.time_s for row in rows]
    runs = _of(rows, Kind.RUN)
    return RunRecord(
        num_rows=num_rows,
        head=head_text(num_rows, row_hash),
        settings=settings_of(runs[-1].body) if runs else {},
        order_sha256=str(runs[-1].body["order_sha256"]) if runs else "",
        plans=tuple(sorted(plans, key=_by_step)),
        steps={step: step_record_of(row) for step, row in steps.items()},
        bodies={step: row.body for step, row in steps.items()},
        num_generations=len(_of(rows, Kind.GENERATION)),
        num_forks=len(_of(rows, Kind.FORK)),
        quarantines=tuple(sorted(quarantines, key=lambda q: (q.domain, q.shard, q.sample))),
        events=Counter(str(row.body["event"]) for row in _of(rows, Kind.EVENT)),
        first_time_s=min(times, default=0.0),
    )


def settings_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the run file with its domains in their order, which the ledger keeps beside it."""
    settings: dict[str, Any] = dict(body["settings"])
    data = settings.get("data")
    if data is not None:
        ordered = {name: data["domains"][name] for name in body["domains"]}
        settings["data"] = {**data, "domains": ordered}
    return settings


def _of(rows: list[Row], kind: Kind) -> list[Row]:
    return [row for row in rows if row.kind is kind]


def _by_step(plan: Plan) -> int:
    return plan.first_step
