"""A ledger: what goes in comes out, nobody else writes, and no byte changes unnoticed."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.ledger import Ledger, read_rows, reading_ledger, verify
from controller.ledger_head import hold_against_head
from controller.ledger_lock import LedgerLock
from controller.ledger_schema import (
    Entry,
    Kind,
    cursors_entry,
    cursors_of,
    event_entry,
    observation_body,
    plan_entry,
    plan_of,
    step_record_of,
)
from controller.observation import StepObservation
from protos.errors import AlreadyServing, ConfigError, LedgerError
from protos.types import Generation, Lane, Mixture, Plan, Step

PLAN = Plan(
    version=3, first_step=Step(9), mixture=Mixture.from_shares((1, 2, 4)), carry_q32=(5, -9, 4)
)
CURSORS = {Lane(lane): np.arange(9, dtype=np.uint32).reshape(3, 3) + lane for lane in (0, 2)}


def _write(path: Path) -> None:
    with Ledger(path, now=lambda: 12.5) as ledger:
        ledger.commit([plan_entry(PLAN, reason="why"), event_entry("something", step=2, count=3)])
        ledger.commit([cursors_entry(Step(4), CURSORS, Generation(1))])


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _write(path)
    with Ledger(path) as ledger:
        assert ledger.num_rows == 3
        plan, event, cursors = ledger.rows()
        assert plan_of(plan) == PLAN
        assert (event.step, event.time_s, event.body) == (
            2,
            12.5,
            {"event": "something", "count": 3},
        )
        for lane, places in cursors_of(cursors).items():
            np.testing.assert_array_equal(places, CURSORS[lane])
        assert ledger.newest(Kind.SEAL) is None


OPTIONAL: dict[str, Any] = {
    "validation_loss": np.array([3.1, 1 / 3, 2.0]),
    "excess_sum": np.array([0.0, 1e-300, 7 / 9]),
    "part_square_norms": np.array([1e-12, 0.0, 2 / 7]),
    "num_parts": np.array([3, 0, 5]),
}


@pytest.mark.parametrize("measured", [False, True])
def test_an_observation_comes_back_to_the_last_bit(tmp_path: Path, measured: bool) -> None:
    draw = np.random.default_rng(0)
    observation = StepObservation(
        step=Step(3),
        num_steps=10,
        planned=draw.random(3),
        sequences=np.array([3, 0, 5]),
        tokens=np.array([48, 0, 80]),
        loss_sum=draw.random(3) * 1e3 / 7,
        alignment=draw.normal(size=(3, 3)) * 1e-9,
        weight_norms=draw.random(2),
        update_norms=np.zeros(0),
        num_missing_ranks=1,
        **(OPTIONAL if measured else {}),
    )
    body = {
        "observation": observation_body(observation),
        "to_policy": True,
        "proposed_step": 5,
    }
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([Entry(kind=Kind.STEP, step=3, body=body)])
        row = ledger.newest(Kind.STEP)
        assert row is not None
        record = step_record_of(row)
    assert (record.to_policy, record.proposed_step) == (True, 5)
    for name in StepObservation.__slots__:
        np.testing.assert_array_equal(
            getattr(record.observation, name), getattr(observation, name), strict=True
        )


@pytest.mark.parametrize("seq", [1, 2, 3])
@pytest.mark.parametrize(
    "change",
    [
        "kind = 'seal'",
        "step = step + 1",
        "time_s = time_s + 1",
        "body = body || ' '",
        "data = x'00'",
        "prev_hash = zeroblob(31)",
        "hash = zeroblob(32)",
        "seq = 99",
    ],
)
def test_a_row_that_was_changed_is_named(tmp_path: Path, seq: int, change: str) -> None:
    path = tmp_path / "ledger.sqlite"
    _write(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"UPDATE ledger SET {change} WHERE seq = ?", (seq,))
    with pytest.raises(LedgerError, match=rf"damaged: row {seq}\b|damaged: it ends at row 2"):
        Ledger(path)


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_a_row_that_was_taken_out_is_missed(tmp_path: Path, seq: int) -> None:
    path = tmp_path / "ledger.sqlite"
    _write(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM ledger WHERE seq = ?", (seq,))
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(path)


def test_a_damaged_ledger_gives_its_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is no database, however long it is made" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(path)
    LedgerLock(path).close()


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _write(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="schema version 99"):
        Ledger(path)
    with pytest.raises(LedgerError, match="schema version 99"), reading_ledger(path):
        pass


def test_a_second_writer_is_told_who_holds_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path), pytest.raises(AlreadyServing, match=f"held by process {os.getpid()}"):
        Ledger(path)
    Ledger(path).close()


def test_a_ledger_closes_twice_and_then_takes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.commit([event_entry("late")])


def test_a_commit_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(LedgerError, match="cannot write"):
            ledger.commit([event_entry("fits"), event_entry("does not", step=1 << 70)])
        assert list(ledger.rows()) == []
        ledger.commit([event_entry("goes on")])
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.num_rows == 1


def test_a_ledger_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.commit([event_entry("first")])
        with reading_ledger(path) as database:
            ledger.commit([event_entry("second")])
            assert verify(database, path)[0] == 1
            assert [row.body["event"] for row in read_rows(database)] == ["first"]
        with reading_ledger(path) as database:
            assert verify(database, path)[0] == 2


def test_rows_are_found_by_kind_and_step(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([event_entry(f"at {step}", step=step) for step in (5, 1, 3, 3)])
        ledger.commit([plan_entry(PLAN, reason="")])
        steps = [row.step for row in ledger.rows(Kind.EVENT, min_step=2)]
        assert steps == [3, 3, 5]
        newest = [row.seq for row in ledger.rows(Kind.EVENT, max_step=3, newest_first=True)]
        assert newest == [4, 3, 2]
        assert [row.seq for row in ledger.rows(Kind.EVENT, Kind.PLAN)] == [1, 2, 3, 4, 5]


def _hold(path: Path, head: str) -> None:
    with reading_ledger(path) as database:
        verify(database, path)
        hold_against_head(database, path, head)


@pytest.mark.fault_row(
    22, "a ledger rolled back whole, or written anew, with a chain that is sound"
)
def test_a_ledger_that_was_rolled_back_is_told_by_a_head_that_was_kept_elsewhere(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    path, heads, copies = tmp_path / "ledger.sqlite", [], []
    with Ledger(path) as ledger:
        assert ledger.head == f"0:{'0' * 64}"
        for number in range(6):
            ledger.commit([event_entry("something", step=number)])
            heads.append(ledger.head)
            copies.append(tmp_path / f"{number}.sqlite")
            with closing(sqlite3.connect(path)) as database:
                database.execute("VACUUM INTO ?", (str(copies[-1]),))
    with Ledger(path) as ledger:
        assert ledger.head == heads[-1], "as a controller that is started again tells it"
    for head in [f"0:{'0' * 64}", *heads]:
        _hold(path, head)
    for kept, head in enumerate(heads):
        for number, copy in enumerate(copies):
            if number >= kept:
                _hold(copy, head)
                continue
            with pytest.raises(LedgerError, match=rf"ends at row {number + 1}, but had row"):
                _hold(copy, head)
            record_injections(1, "rolled back")
    anew = tmp_path / "anew.sqlite"
    with Ledger(anew) as ledger:
        ledger.commit([event_entry("something else", step=number) for number in range(9)])
    for head in heads:
        with pytest.raises(LedgerError, match=r"row \d of the ledger .* written anew"):
            _hold(anew, head)
        record_injections(1, "written anew")


@pytest.mark.parametrize("head", ["", "7", "7:abc", f"-1:{'0' * 64}", f"1:{'A' * 64}", "x" * 999])
def test_what_is_no_head_is_refused_in_one_sentence(tmp_path: Path, head: str) -> None:
    path = tmp_path / "ledger.sqlite"
    _write(path)
    with pytest.raises(ConfigError, match="a ledger's head is ROW:HASH, .* got '"):
        _hold(path, head)
