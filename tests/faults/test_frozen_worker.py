"""A loader worker that is frozen while two ranks stream from it, and then goes on.

It breaks no connection, so that only its silence tells. Others take its lanes; `headrace status`
and the figures for Prometheus name it from the first seconds on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from protos.status import SILENT_S, WorkerStatus
from tests.fakes_consumer import PLENTY_S, ROOT, write_corpus
from tests.faults.arrivals import Arrivals
from tests.faults.checker import check, longest_wait_s, missing_reports, read_evidence
from tests.faults.processes import FaultRun, fault_run, free_address, write_fault_run
from tests.harness_runs import wait_until

pytestmark = pytest.mark.slow

STEP_S = 0.05
FROZEN_S = 20.0
WORKER_TIMEOUT_S = 10.0
"""As by default: a worker that is silent for so long is given up."""

BOUND_S = 15.0
"""For what a waiting rank takes to ask who serves its lanes now (3 s), and for a busy machine."""


def _worker(run: FaultRun, worker_id: str) -> WorkerStatus:
    return next(each for each in run.status().workers if each.worker_id == worker_id)


def _silent_by_metrics(address: str) -> dict[str, float]:
    """Return for how long each worker has been silent, as Prometheus reads it."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PLENTY_S) as answer:
        text = answer.read().decode()
    found = re.findall(r'^headrace_worker_silent_seconds\{.*worker="(\w+)".*\} (\S+)$', text, re.M)
    return {worker: float(seconds) for worker, seconds in found}


def _status_command(run: FaultRun) -> str:
    command = [sys.executable, "-m", "deploy.cli", "status", run.address]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PLENTY_S, check=True
    )
    return done.stdout


@pytest.mark.long
@pytest.mark.fault_row(16, "worker SIGSTOP for 20 s, with the default timeouts")
@pytest.mark.timeout(300)
def test_a_worker_frozen_for_20_s_costs_one_bounded_wait_and_is_named_meanwhile(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    metrics = free_address()
    settings: dict[str, Any] = {
        "steps": 100_000,
        "policy": {"name": "odm", "warmup_steps": 10},
        "control": {"worker_timeout_s": WORKER_TIMEOUT_S},
        "metrics": {"address": metrics},
    }
    run_file = write_fault_run(
        tmp_path / "run", write_corpus(tmp_path / "data", documents=(400, 300, 200)), **settings
    )
    with fault_run(run_file) as run:
        run.start_ranks(2, until=100_000, step_s=STEP_S, options=["--log-batches"])
        run.wait_observed(5)
        arrivals = Arrivals(run.out)
        arrivals.read()
        frozen = run.workers["w0"].process
        endpoint = _worker(run, "w0").endpoint
        served = arrivals.served_by(endpoint)
        assert served
        os.kill(frozen.pid, signal.SIGSTOP)
        frozen_at_s = time.monotonic()
        wait_until(
            lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED,
            timeout_s=10,
            what="the worker to stop",
        )
        # It is named while nobody has given it up yet.
        wait_until(lambda: _worker(run, "w0").silent_s >= SILENT_S, timeout_s=30, what="silence")
        by_metrics = _silent_by_metrics(metrics)
        assert by_metrics["w0"] >= SILENT_S
        assert by_metrics["w0"] > by_metrics["w1"]
        said = _status_command(run)
        (line,) = [each for each in said.splitlines() if "w0" in each]
        assert "silent for" in line or "lost" in line

        def elsewhere() -> bool:
            arrivals.read()
            again = [
                arrivals.served_again_s(each, without=endpoint, since_s=frozen_at_s)
                for each in served
            ]
            return None not in again

        wait_until(elsewhere, timeout_s=60, what="the frozen worker's lanes from another one")
        again_s = time.monotonic() - frozen_at_s
        assert not _worker(run, "w0").alive
        assert "w0" in _silent_by_metrics(metrics)
        before = run.last_logged_step()
        run.wait_observed(before + 10)
        time.sleep(max(FROZEN_S - (time.monotonic() - frozen_at_s), 0.0))  # the fault itself
        assert run.are_training()
        frozen.send_signal(signal.SIGCONT)

        def serves_again() -> bool:
            arrivals.read()
            return bool(arrivals.served_by(endpoint))

        wait_until(serves_again, timeout_s=60, what="lanes for the worker that goes on")
        assert _worker(run, "w0").alive
        last = run.last_logged_step()
        run.wait_observed(last)
        for rank in run.ranks:
            rank.process.kill()
            rank.process.wait(PLENTY_S)
    assert check(run.out) == []
    evidence, _ = read_evidence(run.out)
    assert missing_reports(evidence) == 0
    assert not any(event["degraded"] for event in evidence.events if event["event"] == "step")
    wait_s = longest_wait_s(evidence)
    assert wait_s < WORKER_TIMEOUT_S + BOUND_S
    record_injections(
        1, f"served again after {again_s:.1f} s, longest wait of a step {wait_s:.1f} s"
    )
