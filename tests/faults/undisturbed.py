"""The run that nobody disturbed, with which one under faults is compared: its plans and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind, plan_of
from deploy.history import Delivery
from deploy.record import LEDGER
from protos.types import Plan
from tests.fakes_consumer import Global, consumed_run, global_batches, write_run
from tests.fakes_trainer import wait_until


def plans_through(out: Path, last: int) -> list[Plan]:
    """Return the plans of a run's ledger that come into force up to step `last`."""
    with reading_ledger(out / LEDGER) as database:
        plans = [plan_of(row) for row in read_rows(database, Kind.PLAN)]
    return [plan for plan in plans if plan.first_step <= last]


def batches_through(deliveries: Iterable[Delivery], last: int) -> Global:
    """Return what was in each step and slot up to step `last`."""
    return global_batches(each for each in deliveries if each.step <= last)


def undisturbed(
    out: Path,
    patterns: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    last: int,
    plans_last: int,
) -> tuple[Global, list[Plan]]:
    """Train two ranks through step `last`; return batches, and the plans up to `plans_last`."""
    run_file = write_run(out, patterns, **settings)
    with consumed_run(run_file) as run:
        run.consume(2, until=last + 1)
        wait_until(lambda: run.status().observed_step >= last, timeout_s=60)
        deliveries = run.deliveries()
    return batches_through(deliveries, last), plans_through(out, plans_last)
