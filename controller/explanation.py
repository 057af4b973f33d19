"""A decision told from the ledger: what was seen, what was proposed, what was made of it."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from controller.history import read_amendments
from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind, Row, plan_of, step_record_of
from controller.ledger_view import LedgerView
from controller.observation import StepObservation
from protos.errors import ConfigError
from protos.types import SHARE_ONE


def explain_step(path: Path, step: int) -> dict[str, Any]:
    """Return what the ledger at `path` says of `step`, as JSON values; by domain where it can be.

    Raises:
        LedgerError: the ledger is missing or damaged.
        ConfigError: it knows nothing of the step.
    """
    with reading_ledger(path) as database:
        row = next(_rows_of(database, Kind.STEP, step), None)
        if row is None or _is_superseded(row, database):
            raise ConfigError(f"{path} knows nothing of step {step}{_known(database)}")
        run = next(read_rows(database, Kind.RUN, newest_first=True))
        target = row.body["proposed_step"]
        amendments = read_amendments(LedgerView(database))
        plans = read_rows(database, Kind.PLAN, max_step=max(target, step), newest_first=True)
        plan = next((row for row in plans if amendments.holds(row)), None)
        shadow = next(_rows_of(database, Kind.SHADOW, step), None)
    domains: Sequence[str] = run.body["domains"]
    proposal = row.body.get("proposal")
    decided = _decided(row, plan) if target >= 0 else None
    return {
        "step": step,
        "generation": row.body.get("generation"),
        "observation": _observation(step_record_of(row).observation, domains),
        "policy": {
            "name": run.body["settings"].get("policy", {}).get("name"),
            "phase": row.body.get("policy_phase"),
            "observed": row.body["to_policy"],
            "proposed_step": target if target >= 0 else None,
            "proposal": None if proposal is None else dict(zip(domains, proposal, strict=True)),
            "diagnostics": row.body.get("diagnostics") or {},
        },
        "decision": {
            "mixture": None if decided is None else dict(zip(domains, decided, strict=True)),
            "changed": _changes(domains, proposal, decided),
            "reasons": row.body.get("reasons", []),
            "decision_ms": row.body.get("decision_ms"),
        },
        "plan": _plan(plan, target, domains),
        "shadows": _shadows(shadow, domains),
    }


def _rows_of(database: sqlite3.Connection, kind: Kind, step: int) -> Iterator[Row]:
    return read_rows(database, kind, min_step=step, max_step=step, newest_first=True)


def _is_superseded(row: Row, database: sqlite3.Connection) -> bool:
    """Say whether training went back to before the step and has not come to it again."""
    return any(
        fork.step <= row.step and fork.seq > row.seq for fork in read_rows(database, Kind.FORK)
    )


def _known(database: sqlite3.Connection) -> str:
    newest = next(read_rows(database, Kind.STEP, newest_first=True), None)
    if newest is None:
        return ": no step was reported yet"
    return f"; the newest that was reported is {newest.step}"


def _observation(seen: StepObservation, domains: Sequence[str]) -> dict[str, Any]:
    columns: dict[str, Sequence[Any]] = {
        "planned": seen.planned.tolist(),
        "executed": seen.executed.tolist(),
        "sequences": seen.sequences.tolist(),
        "tokens": seen.tokens.tolist(),
        "loss": [loss if math.isfinite(loss) else None for loss in seen.loss.tolist()],
    }
    for name in ("validation_loss", "excess_sum", "part_square_norms", "num_parts"):
        values = getattr(seen, name)
        if values is not None:
            columns[name] = values.tolist()
    return {
        "domains": {
            domain: {name: values[index] for name, values in columns.items()}
            for index, domain in enumerate(domains)
        },
        "alignment": None if seen.alignment is None else seen.alignment.tolist(),
        "weight_norms": seen.weight_norms.tolist(),
        "update_norms": seen.update_norms.tolist(),
        "missing_ranks": seen.num_missing_ranks,
    }


def _decided(row: Row, plan: Row | None) -> list[float] | None:
    """Return the [domains] shares that were decided: of the plan in force at the target."""
    shares = row.body.get("decided_q32")
    if shares is None and plan is not None:
        shares = plan_of(plan).mixture.shares_q32
    return None if shares is None else [share / SHARE_ONE for share in shares]


def _changes(
    domains: Sequence[str], proposal: Sequence[Any] | None, decided: Sequence[float] | None
) -> dict[str, float]:
    """Return by how much each share was changed, where that is more than rounding."""
    if proposal is None or decided is None:
        return {}
    pairs = zip(domains, proposal, decided, strict=True)
    changes = {
        domain: given - wanted for domain, wanted, given in pairs if isinstance(wanted, float | int)
    }
    return {domain: change for domain, change in changes.items() if abs(change) > 1e-9}


def _plan(row: Row | None, target: int, domains: Sequence[str]) -> dict[str, Any] | None:
    """Return the plan in force at the step that was decided upon."""
    if row is None:
        return None
    plan = plan_of(row)
    return {
        "version": plan.version,
        "first_step": plan.first_step,
        "is_new": plan.first_step == target,
        "mixture": dict(zip(domains, plan.mixture.shares, strict=True)),
        "reason": row.body.get("reason", ""),
    }


def _shadows(row: Row | None, domains: Sequence[str]) -> dict[str, Any]:
    if row is None:
        return {}
    proposed = {
        name: {"proposal": dict(zip(domains, shares, strict=True)), "fault": ""}
        for name, shares in row.body["proposals"].items()
    }
    failed = {
        name: {"proposal": None, "fault": fault} for name, fault in row.body["faults"].items()
    }
    return {**proposed, **failed}
