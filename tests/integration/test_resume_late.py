"""A run goes on at step 1,000,000 as fast as at step 10: nothing is read from the beginning."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from controller.config import RunConfig
from controller.history import crosses_carry_snapshot
from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind, cursors_entry, seal_entry
from protos.types import Cursors, Generation, Step
from tests.fakes_controller import bench, places_after, resume_at, small_run

# It holds against a clock, so nothing else may run beside it.
pytestmark = pytest.mark.slow

_AT_ONCE = 20_000
_SNAPSHOT_EVERY = 100


def _entries(
    step: int,
    cursors: Cursors,
    body: dict[str, object],
    snapshot: Path,
    generation: Generation,
) -> Iterator[Entry]:
    """Yield what the controller writes of one step of a run under one plan."""
    yield Entry(kind=Kind.STEP, step=step, body=body)
    yield cursors_entry(Step(step), cursors, generation)
    carry = np.zeros(3, np.int64) if crosses_carry_snapshot(step + 1, step + 2) else None
    yield seal_entry(step + 2, observed_through=step, carry_after=carry)
    if (step + 1) % _SNAPSHOT_EVERY == 0:
        yield Entry(kind=Kind.SNAPSHOT, step=step, body={"path": str(snapshot)})


def _grow(config: RunConfig, cursors: Cursors, first: int, end: int) -> None:
    """Write the steps from `first` to before `end` into the ledger of a run."""
    with Ledger(config.ledger_path) as ledger:
        row = ledger.newest(Kind.STEP)
        assert row is not None
        saved = ledger.newest(Kind.SNAPSHOT)
        assert saved is not None
        snapshot = Path(saved.body["path"])
        begun = ledger.newest(Kind.GENERATION)
        assert begun is not None
        generation = Generation(begun.body["generation"])
        body = {**row.body, "generation": generation}
        for start in range(first, end, _AT_ONCE):
            entries: list[Entry] = []
            for step in range(start, min(start + _AT_ONCE, end)):
                entries += _entries(step, cursors, body, snapshot, generation)
            ledger.commit(entries)


async def _resumed_within(config: RunConfig, step: int) -> float:
    """Return how long a controller that starts on the ledger needs until the ranks have joined."""
    started = time.perf_counter()
    with bench(config) as controller:
        cursors = places_after(step - 1, controller.spec)
        answer = await controller.join_all(
            1, attempt=f"at {step}", resume=resume_at(step, controller.spec, cursors=cursors)
        )
        assert answer.first_step == step
        assert controller.plans
        return time.perf_counter() - started


async def _run_from_the_start(config: RunConfig, num_steps: int) -> Cursors:
    with bench(config) as controller:
        await controller.join_all(1)
        for step in range(num_steps):
            await controller.report_step(step)
        await controller.loop.snapshot()
        return places_after(num_steps, controller.spec)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(20_000, id="twenty thousand steps"),
        pytest.param(
            1_000_000,
            id="a million steps",
            marks=[pytest.mark.long, pytest.mark.timeout(900)],
        ),
    ],
)
def test_a_late_step_is_resumed_within_two_seconds(tmp_path: Path, end: int) -> None:
    config = small_run(tmp_path, steps=2_000_000)
    cursors = asyncio.run(_run_from_the_start(config, 10))
    early_s = asyncio.run(_resumed_within(config, 10))
    _grow(config, cursors, 10, end)
    late_s = asyncio.run(_resumed_within(config, end))
    print(f"resumed at step 10 in {early_s:.2f} s, at step {end} in {late_s:.2f} s")
    assert late_s < 2.0
