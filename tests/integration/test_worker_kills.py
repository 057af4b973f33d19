"""Workers that are killed, added and taken away while ranks stream: nothing is lost or doubled."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.report import Findings, checks, examine
from tests.fakes_consumer import (
    ConsumedRun,
    Global,
    consumed_run,
    global_batches,
    write_corpus,
    write_run,
)
from tests.fakes_kills import Kill, Killer, killing
from tests.harness_runs import wait_until
from trainer_client import merge_states

pytestmark = pytest.mark.slow

FAULTS = ("lost", "duplicated", "mismatched", "misordered")


def _undisturbed(folder: Path, patterns: dict[str, str], **changes: Any) -> Global:
    run_file = write_run(folder, patterns, **changes)
    with consumed_run(run_file) as run:
        run.consume(1, until=changes["steps"])
        return global_batches(run.deliveries())


def _accounted(out: Path) -> Findings:
    findings = examine(out)
    report = checks(findings)
    assert {name: report[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0), report["faults"]
    assert findings.clean
    return findings


def _consume_with_restarts(run: ConsumedRun, num_steps: int, killer: Killer) -> int:
    """Train in three generations of other sizes; return how many steps were trained again."""
    first, second = num_steps // 3, 2 * num_steps // 3
    back = (first - 3, second - 5)
    states = run.consume(3, until=first, keep=back[:1], after_step=killer.after_step)
    merged = merge_states(states[back[0]])
    states = run.consume(
        8, until=second, resume=lambda rank: merged, keep=back[1:], after_step=killer.after_step
    )
    alone = states[back[1]][0]
    run.consume(2, until=num_steps, resume=lambda rank: alone, after_step=killer.after_step)
    return 3 + 5


def _kill_often(tmp_path: Path, *, num_kills: int, num_steps: int) -> tuple[Findings, list[Kill]]:
    patterns = write_corpus(tmp_path / "data")
    expected = _undisturbed(tmp_path / "undisturbed", patterns, steps=num_steps)
    run_file = write_run(tmp_path / "killed", patterns, steps=num_steps)
    with (
        consumed_run(run_file, num_workers=3) as run,
        killing(run, num_kills=num_kills, first=2, end=num_steps - 6, seed=3) as killer,
    ):
        num_again = _consume_with_restarts(run, num_steps, killer)
    _prove(killer, num_kills)
    findings = _accounted(tmp_path / "killed")
    assert global_batches(findings.history.deliveries) == expected
    assert findings.history.num_superseded == num_again * 20
    assert findings.record.num_generations == 3
    # The last one may come so late that the run ends before the worker is missed.
    assert findings.record.events["worker lost"] >= num_kills - 1
    assert findings.account.num_sequences == len(expected) == num_steps * 20
    return findings, killer.kills


def _prove(killer: Killer, num_kills: int) -> None:
    """Each kill hit another process, which ranks streamed from, and ended it."""
    assert len(killer.kills) == num_kills
    assert len({kill.pid for kill in killer.kills}) == num_kills
    assert {kill.exit_status for kill in killer.kills} == {-signal.SIGKILL}


@pytest.mark.fault_row(15, "worker SIGKILL in mid-stream, while the number of ranks changes")
@pytest.mark.timeout(120)
def test_workers_killed_in_mid_stream_cost_a_pause_and_nothing_else(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    _, kills = _kill_often(tmp_path, num_kills=4, num_steps=60)
    record_injections(len(kills))


@pytest.mark.long
@pytest.mark.fault_row(15, "worker SIGKILL 30 times, while the number of ranks changes")
@pytest.mark.timeout(900)
def test_30_kills_lose_double_and_change_nothing(
    tmp_path: Path, record_injections: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    findings, kills = _kill_often(tmp_path, num_kills=30, num_steps=600)
    record_injections(len(kills))
    with capsys.disabled():
        print()
        for kill in kills:
            print(
                f"after step {kill.after_step}: SIGKILL to {kill.worker_id} (pid {kill.pid}) "
                f"with lanes {list(kill.lanes)}; {kill.num_left} other workers there"
            )
        events = dict(findings.record.events)
        print(json.dumps({"kills": len(kills), **checks(findings), "events": events}, indent=2))


@pytest.mark.timeout(120)
def test_workers_that_come_and_are_ended_at_once_while_ranks_stream_lose_nothing(
    tmp_path: Path,
) -> None:
    patterns = write_corpus(tmp_path / "data")
    num_steps = 90
    expected = _undisturbed(tmp_path / "undisturbed", patterns, steps=num_steps)
    run_file = write_run(tmp_path / "out", patterns, steps=num_steps)
    with consumed_run(run_file, drain_s=0) as run:

        def ready(*worker_ids: str) -> None:
            wait_until(
                lambda: set(run.alive()) == set(worker_ids), timeout_s=60, what=f"{worker_ids}"
            )

        served_by: set[str] = set()

        def change(step: int) -> None:
            # Ranks wait meanwhile, with batches prefetched and streams open.
            served_by.update(run.streaming())
            if step == 15:
                streaming = run.streaming()
                run.add_worker("a1")
                run.add_worker("a2")
                ready("a1", "a2", "w0")
                assert run.streaming() == streaming
            if step in leaving:
                endpoint = run.alive()[leaving[step]]
                assert endpoint in run.streaming()
                assert run.end_worker(leaving[step], signal.SIGTERM) == 0
            if step == 55:
                run.add_worker("a3")
                ready("a2", "a3")

        leaving = {30: "w0", 45: "a1", 70: "a2"}
        run.consume(3, until=num_steps, after_step=change)
        assert set(run.alive()) == {"a3"}
        assert served_by == {each.endpoint for each in run.status().workers}
        assert global_batches(run.deliveries()) == expected
    _accounted(tmp_path / "out")
