"""Reports of steps long past are dropped: the chain verifies, and all else is as it was."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from controller.history import book_from, cursors_before, read_history
from controller.ledger import Ledger, read_rows, reading_ledger, verify
from controller.ledger_head import head_text, hold_against_head
from controller.ledger_schema import Kind, Row, plan_of
from protos.errors import ConfigError, LedgerError
from protos.spec import RunSpec
from protos.types import Step
from tests.fakes_controller import ODM, Bench, bench, make_beat, small_run

KEEP = 20
NUM_STEPS = 75


async def _train(controller: Bench, steps: range) -> None:
    for step in steps:
        await controller.report_step(step)
        await controller.loop.finish_saving()


def _run(folder: Path, keep: int | None) -> tuple[list[Row], Path, RunSpec]:
    config = small_run(
        folder,
        policy=ODM,
        steps=1000,
        ledger={"keep_steps": keep},
        control={"snapshot_every": 5},
    )

    async def scenario() -> RunSpec:
        with bench(config) as controller:
            await controller.join_all(1)
            await _train(controller, range(NUM_STEPS - 20))
        # Also over a restart.
        with bench(config) as controller:
            controller.workers.told_plans("worker-0")
            for _ in range(2):
                controller.workers.beat(make_beat(generation=1))
            await _train(controller, range(NUM_STEPS - 20, NUM_STEPS))
            return controller.spec

    spec = asyncio.run(scenario())
    with reading_ledger(config.ledger_path) as database:
        verify(database, config.ledger_path)
        verify(database, config.ledger_path, last=7)
        return list(read_rows(database)), config.ledger_path, spec


def _of(rows: list[Row], kind: Kind) -> list[Row]:
    return [row for row in rows if row.kind is kind]


def test_old_reports_are_dropped_and_plans_are_not(tmp_path: Path) -> None:
    pruned, path, spec = _run(tmp_path / "pruned", KEEP)
    whole, whole_path, _ = _run(tmp_path / "whole", None)
    plans = [[plan_of(row) for row in _of(rows, Kind.PLAN)] for rows in (pruned, whole)]
    assert plans[0] == plans[1]
    steps = [row.step for row in _of(pruned, Kind.STEP)]
    assert steps == list(range(steps[0], NUM_STEPS))
    assert KEEP <= len(steps) <= KEEP + 15
    assert [row.step for row in _of(whole, Kind.STEP)] == list(range(NUM_STEPS))
    # What is left is what the whole ledger has of the same steps.
    assert [row.body["observation"] for row in _of(pruned, Kind.STEP)] == [
        row.body["observation"] for row in _of(whole, Kind.STEP)[steps[0] :]
    ]
    assert len(_of(pruned, Kind.PRUNE)) > 3
    with Ledger(path) as ledger, Ledger(whole_path) as other:
        for step in (steps[0] + 1, NUM_STEPS):
            known, wanted = (cursors_before(each, Step(step), spec) for each in (ledger, other))
            assert {lane: at for lane, (at, _) in known.items()} == {
                lane: at for lane, (at, _) in wanted.items()
            }
        for at in range(0, NUM_STEPS, 9):
            book, same = (book_from(each, Step(at), spec) for each in (ledger, other))
            assert book.carry(Step(at + 1)).tolist() == same.carry(Step(at + 1)).tolist()
        assert read_history(ledger, spec).observed_through == NUM_STEPS - 1


def test_a_head_is_held_against_what_is_left_and_one_of_a_dropped_row_is_said_to_be(
    tmp_path: Path,
) -> None:
    rows, path, _ = _run(tmp_path, KEEP)
    with closing(sqlite3.connect(path)) as database:
        for seq, row_hash in database.execute("SELECT seq, hash FROM ledger").fetchall():
            hold_against_head(database, path, head_text(seq, row_hash))
        left = {seq for (seq,) in database.execute("SELECT seq FROM ledger")}
        dropped = min(set(range(1, rows[-1].seq)) - left)
        with pytest.raises(ConfigError, match=rf"row {dropped} of .* was dropped since"):
            hold_against_head(database, path, head_text(dropped, bytes(32)))


def test_a_pruned_ledger_stays_small(tmp_path: Path) -> None:
    _, pruned, _ = _run(tmp_path / "pruned", KEEP)
    _, whole, _ = _run(tmp_path / "whole", None)
    sizes = []
    for path in (pruned, whole):
        with closing(sqlite3.connect(path)) as database:
            (size,) = database.execute(
                "SELECT sum(length(body) + coalesce(length(data), 0)) FROM ledger "
                "WHERE kind IN ('step', 'cursors', 'anchor')"
            ).fetchone()
        sizes.append(size)
    assert sizes[0] < 0.5 * sizes[1]


def _change(sql: str) -> Callable[[sqlite3.Connection], object]:
    return lambda database: database.execute(sql)


FALSIFIED: dict[str, tuple[Callable[[sqlite3.Connection], object], str]] = {
    "an anchor in a row's place": (
        _change(
            "UPDATE ledger SET kind = 'anchor', step = -1, time_s = 0.0, data = NULL, "
            "body = '{\"first_seq\":' || seq || '}' WHERE seq = (SELECT max(seq) FROM ledger "
            "WHERE kind = 'plan')"
        ),
        "no record says were dropped",
    ),
    "an anchor that begins elsewhere": (
        _change(
            "UPDATE ledger SET body = '{\"first_seq\":3}' WHERE seq = (SELECT min(seq) FROM "
            "ledger WHERE kind = 'anchor')"
        ),
        "is missing|no record",
    ),
    "an anchor taken out": (
        _change("DELETE FROM ledger WHERE seq = (SELECT min(seq) FROM ledger WHERE kind='anchor')"),
        "is missing",
    ),
    "another hash in an anchor": (
        _change("UPDATE ledger SET hash = zeroblob(32) WHERE kind = 'anchor'"),
        "was changed|no record",
    ),
    "no sense in an anchor": (
        _change("UPDATE ledger SET body = 'x' WHERE kind = 'anchor'"),
        "is missing",
    ),
}


@pytest.mark.parametrize("name", FALSIFIED)
def test_rows_taken_out_under_the_name_of_pruning_are_missed(tmp_path: Path, name: str) -> None:
    _, path, _ = _run(tmp_path, KEEP)
    change, says = FALSIFIED[name]
    with closing(sqlite3.connect(path)) as database, database:
        change(database)
    with pytest.raises(LedgerError, match=says):
        Ledger(path)
