"""The checker finds what is wrong with a history, whatever it is: it can fail."""

from __future__ import annotations

import copy
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.ledger_schema import Kind, Row
from deploy.history import Delivery
from deploy.record import LEDGER
from tests.fakes_consumer import write_corpus
from tests.faults.checker import Evidence, check, violations
from tests.faults.processes import fault_run, write_fault_run

NUM_STEPS, NUM_SLOTS = 4, 4
HALF = [1 << 31, 1 << 31]


def _row(seq: int, kind: Kind, step: int, **body: Any) -> Row:
    return Row(seq=seq, kind=kind, step=step, time_s=float(seq), body=body, data=None)


def _plan(seq: int, version: int, step: int) -> Row:
    return _row(seq, Kind.PLAN, step, version=version, shares_q32=HALF, carry_q32=[0, 0])


def _delivery(step: int, slot: int) -> Delivery:
    return Delivery(
        generation=1,
        step=step,
        slot=slot,
        lane=slot,
        domain="web",
        epoch=0,
        window=0,
        sequence=step,
        num_tokens=16,
        sha256="0" * 64,
    )


def _clean() -> Evidence:
    """Two ranks that trained four steps under two plans, and nothing went wrong."""
    events: list[dict[str, Any]] = []
    for rank in range(2):
        events.append({"event": "joined", "rank": rank, "generation": 1, "first_step": 0})
        for step in range(NUM_STEPS):
            here = {"rank": rank, "generation": 1, "time_s": step + 0.5}
            version = 1 if step < 2 else 2
            events.append({"event": "step", "step": step, "plan_version": version, **here})
            answer = {"steps": [step], "counted": True, "plan_version": 2}
            events.append({"event": "answer", "sealed_through": step + 2, **answer, **here})
    rows = [_plan(1, 1, 0), _row(2, Kind.GENERATION, 0, generation=1), _plan(3, 2, 2)]
    for step in range(NUM_STEPS):
        observation = {"sequences": [2, 2], "missing_ranks": 0}
        rows.append(
            _row(
                4 + 2 * step,
                Kind.STEP,
                step,
                generation=1,
                world_size=2,
                observation=observation,
            )
        )
        rows.append(_row(5 + 2 * step, Kind.SEAL, step + 2))
    deliveries = [_delivery(step, slot) for step in range(NUM_STEPS) for slot in range(NUM_SLOTS)]
    return Evidence(events=events, deliveries=deliveries, rows=rows, global_sequences=NUM_SLOTS)


def test_a_clean_history_has_no_violations() -> None:
    assert violations(_clean()) == []


@pytest.mark.parametrize("through", [1, 2])
def test_a_plan_of_lanes_alone_is_no_violation_where_the_ledger_says_so(through: int) -> None:
    """Rank 0 had plan 1 in step 2, too, where plan 2 held."""
    clean = _clean()
    events = [dict(event) for event in clean.events]
    for event in events:
        if (event["event"], event["rank"], event.get("step")) == ("step", 0, 2):
            event["plan_version"] = 1
    amend = _row(99, Kind.AMEND, 1, generation=1, version=1, through=through, lanes=[0, 1])
    found = violations(replace(clean, events=events, rows=[*clean.rows, amend]))
    assert [fault[:2] for fault in found] == ([] if through == 2 else ["I2", "I2"])


Planted = Callable[[Evidence], Evidence]


def _event(name: str, position: int, **changes: Any) -> Planted:
    def plant(evidence: Evidence) -> Evidence:
        events = [dict(event) for event in evidence.events]
        found = [event for event in events if event["event"] == name]
        found[position].update(changes)
        return replace(evidence, events=events)

    return plant


def _no_delivery(position: int) -> Planted:
    def plant(evidence: Evidence) -> Evidence:
        kept = list(evidence.deliveries)
        del kept[position]
        return replace(evidence, deliveries=kept)

    return plant


def _rows(change: Callable[[list[Row]], object]) -> Planted:
    def plant(evidence: Evidence) -> Evidence:
        rows = copy.deepcopy(list(evidence.rows))
        change(rows)
        return replace(evidence, rows=rows)

    return plant


def _observation(position: int, **changes: Any) -> Planted:
    def change(rows: list[Row]) -> None:
        steps = [row for row in rows if row.kind is Kind.STEP]
        steps[position].body["observation"].update(changes)

    return _rows(change)


PLANTED: dict[str, tuple[Planted, str]] = {
    "one rank has another plan": (_event("step", 1, plan_version=2), r"I2: ranks applied plans"),
    "all ranks keep an old plan": (
        lambda evidence: _event("step", 6, plan_version=1)(
            _event("step", 2, plan_version=1)(evidence)
        ),
        r"I2: step 2 .* plan 2 in the ledger, ranks applied",
    ),
    "a slot was lost": (_no_delivery(5), r"I3: slots \[1\] never came in generation 1, step 1"),
    "a slot came twice": (
        lambda evidence: replace(
            evidence, deliveries=[*evidence.deliveries, evidence.deliveries[6]]
        ),
        r"I3: slots \[2\] came more than once in generation 1, step 1",
    ),
    "a step was ended twice": (
        lambda evidence: replace(evidence, events=[*evidence.events, evidence.events[1]]),
        r"I3: a rank ended generation 1, step 0 twice",
    ),
    "a promised seal is gone": (_rows(lambda rows: rows.pop()), r"I4: .* seal through 5"),
    "a promised plan is gone": (_rows(lambda rows: rows.pop(2)), r"I4: .* told of plan 2"),
    "a report was counted twice": (
        _observation(1, sequences=[4, 2]),
        r"I5: step 1 counts 6 sequences: a report counted twice",
    ),
    "a report was left out silently": (
        _observation(1, sequences=[1, 1]),
        r"I5: step 1 counts 2 of 4 sequences, though all 2 ranks",
    ),
    "a step was closed twice": (
        _rows(lambda rows: rows.append(rows[3])),
        r"I5: step 0 of generation 1 was closed 2 times",
    ),
    "two controllers wrote plans": (
        _rows(lambda rows: rows.append(_plan(99, 2, 5))),
        r"I6: plan numbers do not grow",
    ),
    "two controllers began generations": (
        _rows(lambda rows: rows.append(_row(99, Kind.GENERATION, 4, generation=1))),
        r"I6: generation numbers do not grow",
    ),
    "a seal was taken back": (
        _rows(lambda rows: rows.append(_row(99, Kind.SEAL, 3))),
        r"I6: a seal reaches less far",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    plant, expected = PLANTED[name]
    found = violations(plant(_clean()))
    assert found, name
    assert any(re.search(expected, violation) for violation in found), found


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_real_run_is_clean_until_its_logs_are_falsified(tmp_path: Path) -> None:
    run_file = write_fault_run(tmp_path / "out", write_corpus(tmp_path / "data"), steps=30)
    out = run_file.parent
    with fault_run(run_file) as run:
        run.start_ranks(2, until=30, step_s=0.0)
        run.wait_ranks(90)
    assert check(out) == []
    log = out / "received" / "received.rank0.jsonl"
    written = log.read_text()
    lines = written.splitlines()
    log.write_text("\n".join(lines[:-5] + lines[-4:]) + "\n")
    assert any(found.startswith("I3") for found in check(out))
    wrong = {**json.loads(lines[7]), "sha256": "f" * 64}
    log.write_text("\n".join([*lines[:7], json.dumps(wrong), *lines[8:]]) + "\n")
    assert any("mismatched" in found for found in check(out))
    log.write_text(written)
    assert check(out) == []
    with closing(sqlite3.connect(out / LEDGER)) as database, database:
        database.execute("UPDATE ledger SET body = body || ' ' WHERE seq = 9")
    assert any(found.startswith("I4") for found in check(out))


_FAULTLESS = """
import pytest

@pytest.mark.fault_row(1, "nothing at all")
def test_whose_fault_never_happens(): pass

@pytest.mark.fault_row(2, "a fault that happens")
def test_whose_fault_happens(record_injections): record_injections(3, "seen three times")
"""


def test_a_fault_test_without_an_injection_fails_and_the_table_says_what_ran(
    tmp_path: Path,
) -> None:
    folder, table = tmp_path / "suite", tmp_path / "table.md"
    folder.mkdir()
    (folder / "test_it.py").write_text(_FAULTLESS)
    marks = "markers =\n faults: f\n fault_row(number, fault): r\n"
    (folder / "pytest.ini").write_text(f"[pytest]\n{marks}")
    options = ["-p", "tests.fault_table", "-p", "no:cacheprovider", "--fault-table", str(table)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "recorded not one injection" in done.stdout
    written = table.read_text()
    assert "| 1 | nothing at all | `test_it.py::test_whose_fault_never_happens` | 0 | FAILED |" in (
        written
    )
    assert "| 3 | held (seen three times) |" in written
    assert "1 of 2 rows held in all tests; 3 injections." in written
