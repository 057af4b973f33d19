"""SIGKILLs of the controller at random moments of a run of two ranks, outside Ray.

No step waits for it, no report is lost or counted twice, and plans and batches are those of a run
that nobody disturbed. All this with a policy that learns from every report.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind, Row
from deploy.history import read_deliveries
from deploy.record import LEDGER
from deploy.training import RECEIVED
from tests.fakes_consumer import DOMAINS, write_corpus
from tests.faults.checker import check, longest_wait_s, missing_reports, read_evidence
from tests.faults.processes import FaultRun, fault_run, write_fault_run
from tests.faults.undisturbed import batches_through, plans_through, undisturbed

pytestmark = pytest.mark.slow

STEP_S = 0.1
LAG = 150
"""Steps decided ahead: 15 seconds' worth, as two steps of 7.5 s are. Longer than a controller is
away, killed twice in a row, so that no step needs one that is dead."""

DECIDING_S = 5.0
LONGEST_WAIT_S = 1.0
"""A step that waited for a dead controller would wait until the next one decides, or longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """A controller that was killed."""

    pid: int
    time_s: float
    """Of the wall clock, as in the ledger."""

    was_deciding: bool
    """It had decided since the last kill; else it was still on its way up."""


NUM_STEPS = 100_000
"""More than are trained."""


def _settings() -> dict[str, Any]:
    return {
        "steps": NUM_STEPS,
        "policy": {"name": "odm", "warmup_steps": 10},
        "control": {"lag": LAG, "snapshot_every": 25},
    }


def _kill(run: FaultRun, num_kills: int, *, seed: int) -> list[Kill]:
    draw = random.Random(seed)
    kills: list[Kill] = []
    while len(kills) < num_kills:
        assert run.are_training(), run.ranks[0].log.read_text()
        deciding = draw.random() < 0.8
        if deciding:
            before = _newest_decision_s(run.out)
            _until(lambda before=before: _newest_decision_s(run.out) > before)  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, 1.0))
        told_s = time.time()
        pid = run.controller.kill()
        kills.append(Kill(pid=pid, time_s=told_s, was_deciding=deciding))
    return kills


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "no decision for a minute"
        time.sleep(0.02)


def _rows(out: Path, *kinds: Kind) -> list[Row]:
    with reading_ledger(out / LEDGER) as database:
        return list(read_rows(database, *kinds))


def _newest_decision_s(out: Path) -> float:
    with reading_ledger(out / LEDGER) as database:
        newest = next(read_rows(database, Kind.STEP, newest_first=True), None)
    return newest.time_s if newest is not None else 0.0


def _recovery_s(out: Path, kills: list[Kill]) -> list[float]:
    """Return the seconds from each kill to the next decision, if no other kill came before it."""
    decided = np.array([row.time_s for row in _rows(out, Kind.STEP)])
    recovery = []
    for kill, following in zip(kills, [*kills[1:], None], strict=True):
        later = decided[decided > kill.time_s]
        end = following.time_s if following is not None else np.inf
        if len(later) and later[0] < end:
            recovery.append(float(later[0] - kill.time_s))
    return recovery


def _survive(tmp_path: Path, *, num_kills: int, seed: int) -> dict[str, Any]:
    patterns = write_corpus(tmp_path / "data", documents=(600, 450, 300))
    run_file = write_fault_run(tmp_path / "killed", patterns, **_settings())
    out = run_file.parent
    with fault_run(run_file) as run:
        run.start_ranks(2, until=NUM_STEPS, step_s=STEP_S)
        run.wait_observed(5)
        kills = _kill(run, num_kills, seed=seed)
        last = run.last_logged_step()
        run.wait_observed(last)
        for rank in run.ranks:
            rank.process.kill()
        starts = list(run.controller.starts)
    assert len({kill.pid for kill in kills}) == num_kills
    assert [start.exit_status for start in starts[:num_kills]] == [-signal.SIGKILL] * num_kills
    assert check(out) == []
    evidence, _ = read_evidence(out)
    assert missing_reports(evidence) == 0
    steps = [event for event in evidence.events if event["event"] == "step"]
    assert not any(event["degraded"] for event in steps)
    # Every decision that followed from these steps, also on steps that nobody trained.
    batches, plans = undisturbed(
        tmp_path / "undisturbed", patterns, _settings(), last=last, plans_last=last + LAG
    )
    assert plans_through(out, last + LAG) == plans
    assert batches_through(read_deliveries(out / RECEIVED, DOMAINS), last) == batches
    recovery = _recovery_s(out, kills)
    return {
        "kills": num_kills,
        "while_deciding": sum(kill.was_deciding for kill in kills),
        "steps": last + 1,
        "plans": len(plans),
        "sequences": len(batches),
        "recoveries": len(recovery),
        "recovery_s": {
            "p50": round(float(np.percentile(recovery, 50)), 2),
            "p99": round(float(np.percentile(recovery, 99)), 2),
            "max": round(max(recovery), 2),
        },
        "longest_wait_s": round(longest_wait_s(evidence), 3),
        "step_s_p99": round(float(np.percentile([each["step_s"] for each in steps], 99)), 3),
    }


@pytest.mark.fault_row(1, "controller SIGKILL at random moments")
@pytest.mark.timeout(180)
def test_a_few_kills_of_the_controller_change_nothing_and_no_step_waits(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    figures = _survive(tmp_path, num_kills=3, seed=1)
    assert figures["longest_wait_s"] < LONGEST_WAIT_S
    record_injections(figures["kills"], f"recovery p50 {figures['recovery_s']['p50']} s")


@pytest.mark.long
@pytest.mark.fault_row(1, "controller SIGKILL at 100 random moments")
@pytest.mark.timeout(1500)
def test_100_kills_of_the_controller_change_nothing_and_no_step_waits(
    tmp_path: Path, record_injections: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = _survive(tmp_path, num_kills=100, seed=7)
    with capsys.disabled():
        print("\n" + json.dumps(figures, indent=2))
    assert figures["longest_wait_s"] < LONGEST_WAIT_S
    assert figures["recovery_s"]["p99"] <= DECIDING_S
    p99, wait = figures["recovery_s"]["p99"], figures["longest_wait_s"]
    record_injections(figures["kills"], f"deciding again p99 {p99} s, longest wait {wait} s")
