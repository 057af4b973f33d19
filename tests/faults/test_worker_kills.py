"""SIGKILLs of loader workers that two ranks stream from, spread over a run outside Ray.

Another worker takes a dead one's lanes within seconds; plans and batches are those of a run that
nobody disturbed, with a policy that learns from every report.
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

from deploy.history import read_deliveries
from deploy.training import RECEIVED
from tests.fakes_consumer import DOMAINS, write_corpus
from tests.faults.arrivals import Arrivals
from tests.faults.checker import check, longest_wait_s, missing_reports, read_evidence
from tests.faults.processes import (
    LOOK_EVERY_S,
    PLENTY_S,
    FaultRun,
    fault_run,
    write_fault_run,
)
from tests.faults.undisturbed import batches_through, plans_through, undisturbed

pytestmark = pytest.mark.slow

STEP_S = 0.05
NUM_STEPS = 100_000
"""More than are trained."""

LAG = 2
SERVED_AGAIN_S = 10.0

SETTINGS: dict[str, Any] = {
    "steps": NUM_STEPS,
    "policy": {"name": "odm", "warmup_steps": 10},
    "control": {"lag": LAG, "snapshot_every": 100},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """A worker that was killed while ranks streamed from it."""

    worker_id: str
    pid: int
    exit_status: int
    num_left: int
    """Workers that were enlisted beside it."""

    num_served: int
    """Lanes that it served, counted for each rank."""

    served_again_s: float
    """From the kill until each of them had batches from another process."""


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PLENTY_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PLENTY_S:g} s for {what}"
        time.sleep(LOOK_EVERY_S)


class Killer:
    """Kills workers of a run, one by one, and starts others in their place."""

    def __init__(self, run: FaultRun, *, seed: int) -> None:
        self._run = run
        self._draw = random.Random(seed)
        self._arrivals = Arrivals(run.out)
        self.kills: list[Kill] = []

    def kill_after(self, num_steps: int) -> None:
        """Let ranks train so many more steps, then kill a worker and wait until others serve."""
        run, reached = self._run, self._run.last_logged_step() + num_steps
        _until(lambda: run.last_logged_step() >= reached, f"step {reached}")
        assert run.are_training(), run.ranks[0].log.read_text()[-2000:]
        victim, endpoint, num_left = self._victim()
        worker = run.workers.pop(victim)
        self._arrivals.read()
        served = self._arrivals.served_by(endpoint)
        killed_s = time.monotonic()
        exit_status = worker.end(signal.SIGKILL)
        # As Ray restarts an actor under its name, or as another node joins.
        again = self._draw.random() < 0.5
        run.add_worker(victim if again else f"r{len(self.kills)}")

        def all_again() -> bool:
            self._arrivals.read()
            times = [
                self._arrivals.served_again_s(each, without=endpoint, since_s=killed_s)
                for each in served
            ]
            return None not in times

        _until(all_again, f"lanes of the killed worker {victim}, {sorted(served)}, to be served")
        times = [
            self._arrivals.served_again_s(each, without=endpoint, since_s=killed_s) or 0.0
            for each in served
        ]
        self.kills.append(
            Kill(
                worker_id=victim,
                pid=worker.process.pid,
                exit_status=exit_status,
                num_left=num_left,
                num_served=len(served),
                served_again_s=max(times) - killed_s,
            )
        )

    def _victim(self) -> tuple[str, str, int]:
        """Return a worker that ranks stream from, its endpoint, and how many others there are."""
        found: list[tuple[str, str, int]] = []

        def look() -> bool:
            self._arrivals.read()
            alive = [each for each in self._run.status().workers if each.alive]
            found[:] = [
                (each.worker_id, each.endpoint, len(alive) - 1)
                for each in alive
                if each.worker_id in self._run.workers
                and self._arrivals.served_by(each.endpoint)
                and len(alive) > 1
            ]
            return bool(found)

        _until(look, "a worker that ranks stream from, and another beside it")
        return self._draw.choice(found)


def _survive(tmp_path: Path, *, num_kills: int, seed: int) -> dict[str, Any]:
    patterns = write_corpus(tmp_path / "data", documents=(600, 450, 300))
    run_file = write_fault_run(tmp_path / "killed", patterns, **SETTINGS)
    out = run_file.parent
    draw = random.Random(seed)
    with fault_run(run_file, num_workers=3) as run:
        run.start_ranks(2, until=NUM_STEPS, step_s=STEP_S, options=["--log-batches"])
        run.wait_observed(5)
        killer = Killer(run, seed=seed)
        for _ in range(num_kills):
            killer.kill_after(draw.randrange(3, 20))
        last = run.last_logged_step()
        run.wait_observed(last)
        for rank in run.ranks:
            rank.process.kill()
            rank.process.wait(PLENTY_S)
        assert not run.controller.starts, "the controller was restarted"
    kills = killer.kills
    assert len({kill.pid for kill in kills}) == num_kills
    assert {kill.exit_status for kill in kills} == {-signal.SIGKILL}
    assert all(kill.num_served for kill in kills)
    assert check(out) == []
    evidence, findings = read_evidence(out)
    assert missing_reports(evidence) == 0
    assert not any(event["degraded"] for event in evidence.events if event["event"] == "step")
    batches, plans = undisturbed(
        tmp_path / "undisturbed", patterns, SETTINGS, last=last, plans_last=last + LAG
    )
    assert plans_through(out, last + LAG) == plans
    assert batches_through(read_deliveries(out / RECEIVED, DOMAINS), last) == batches
    again = [kill.served_again_s for kill in kills]
    return {
        "kills": num_kills,
        "steps": last + 1,
        "plans": len(plans),
        "sequences": len(batches),
        "lanes_struck": sum(kill.num_served for kill in kills),
        "killed_beside_one_other": sum(kill.num_left == 1 for kill in kills),
        "workers_lost": findings.record.events["worker lost"],
        "served_again_s": {
            "p50": round(float(np.percentile(again, 50)), 2),
            "p99": round(float(np.percentile(again, 99)), 2),
            "max": round(max(again), 2),
        },
        "longest_wait_s": round(longest_wait_s(evidence), 2),
    }


@pytest.mark.fault_row(15, "worker SIGKILL while two ranks stream")
@pytest.mark.timeout(180)
def test_a_few_kills_of_workers_change_nothing_and_others_serve_within_seconds(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    figures = _survive(tmp_path, num_kills=3, seed=1)
    assert figures["served_again_s"]["max"] <= SERVED_AGAIN_S
    record_injections(figures["kills"], f"served again after {figures['served_again_s']['max']} s")


@pytest.mark.long
@pytest.mark.fault_row(15, "worker SIGKILL 100 times, spread over a run of two ranks")
@pytest.mark.timeout(1500)
def test_100_kills_of_workers_change_nothing_and_others_serve_within_seconds(
    tmp_path: Path, record_injections: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = _survive(tmp_path, num_kills=100, seed=7)
    with capsys.disabled():
        print("\n" + json.dumps(figures, indent=2))
    assert figures["served_again_s"]["max"] <= SERVED_AGAIN_S
    again = figures["served_again_s"]
    told = ", ".join(f"{name} {seconds} s" for name, seconds in again.items())
    record_injections(figures["kills"], f"served again after: {told}")
