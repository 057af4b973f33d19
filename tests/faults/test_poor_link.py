"""Ranks behind a link that loses packets, and behind one that is slow: slower, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.history import read_deliveries
from deploy.training import RECEIVED
from tests.fakes_consumer import DOMAINS, write_corpus
from tests.faults.checker import Evidence, check, missing_reports, read_evidence
from tests.faults.processes import (
    PLENTY_S,
    FaultRun,
    RankProcess,
    fault_run,
    free_address,
    write_fault_run,
)
from tests.faults.undisturbed import batches_through, plans_through, undisturbed
from tests.net_nodes import Network, network

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

TRAINERS = "trainers"
LAG = 2
SEQUENCE_LENGTH, GLOBAL_SEQUENCES = 512, 20
STEP_BYTES = GLOBAL_SEQUENCES * (SEQUENCE_LENGTH + 1) * 2
"""Of tokens alone, of two bytes each."""

LINK_BYTES_PER_S = 1e6 / 8
SETTINGS: dict[str, Any] = {
    "steps": 100_000,
    "policy": {"name": "odm", "warmup_steps": 10},
    "control": {"lag": LAG},
    "batch": {"sequence_length": SEQUENCE_LENGTH},
}


@contextmanager
def _run_over_a_link(out: Path, patterns: dict[str, str]) -> Iterator[tuple[FaultRun, Network]]:
    """Serve a run here, and train it as two ranks on another machine, as fast as data comes."""
    with network() as net:
        net.add(TRAINERS)
        port = free_address().rpartition(":")[2]
        run_file = write_fault_run(
            out,
            patterns,
            address=f"{net.gateway}:{port}",
            security={"insecure": True},
            **SETTINGS,
        )
        options = ["--address", f"{net.gateway}:0", "--insecure"]
        with fault_run(run_file, worker_options=options) as run:
            run.ranks = [
                RankProcess(run, rank, 2, until=100_000, step_s=0.0, prefix=net.on(TRAINERS))
                for rank in range(2)
            ]
            run.wait_observed(10)
            yield run, net


def _train(run: FaultRun, num_steps: int) -> tuple[float, float]:
    """Wait until ranks have trained so many steps; return when that began and ended."""
    began_s, reached = time.monotonic(), run.last_logged_step() + num_steps
    run.wait_observed(reached, timeout_s=2 * PLENTY_S)
    assert run.are_training(), run.ranks[0].log.read_text()[-2000:]
    return began_s, time.monotonic()


def _pace(evidence: Evidence, span: tuple[float, float]) -> dict[str, float]:
    """Return steps a second of a rank in a span of time, and how long a batch took to come."""
    took = [
        event["wait_s"]
        for event in evidence.events
        if event["event"] == "step" and span[0] <= event["time_s"] <= span[1]
    ]
    return {
        "steps_per_s": round(len(took) / 2 / (span[1] - span[0]), 1),
        "batch_p50_ms": round(1000 * float(np.percentile(took, 50)), 1),
        "batch_p99_ms": round(1000 * float(np.percentile(took, 99)), 1),
    }


def _hold(
    tmp_path: Path,
    worsen: Callable[[Network], None],
    mend: Callable[[Network], int],
    *,
    num_steps: int,
) -> tuple[int, dict[str, float], dict[str, float]]:
    """Train over a good link, a poor one and a good one; return hits, and both links' paces."""
    patterns = write_corpus(tmp_path / "data", documents=(400, 300, 200))
    with _run_over_a_link(tmp_path / "run", patterns) as (run, net):
        good_span = _train(run, num_steps)
        worsen(net)
        poor_span = _train(run, num_steps)
        num_hit = mend(net)
        _train(run, 20)
        last = run.last_logged_step()
        run.wait_observed(last)
        for rank in run.ranks:
            rank.process.kill()
            rank.process.wait(PLENTY_S)
        assert not run.controller.starts, "the controller was restarted"
    assert check(run.out) == []
    evidence, findings = read_evidence(run.out)
    assert missing_reports(evidence) == 0
    assert not any(event["degraded"] for event in evidence.events if event["event"] == "step")
    assert not findings.record.events["worker lost"]
    batches, plans = undisturbed(
        tmp_path / "undisturbed", patterns, SETTINGS, last=last, plans_last=last + LAG
    )
    assert plans_through(run.out, last + LAG) == plans
    assert batches_through(read_deliveries(run.out / RECEIVED, DOMAINS), last) == batches
    return num_hit, _pace(evidence, good_span), _pace(evidence, poor_span)


@pytest.mark.fault_row(8, "5 % of the packets lost, both ways")
def test_a_link_that_loses_packets_slows_training_and_breaks_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    num_lost, good, poor = _hold(
        tmp_path,
        lambda net: net.lose(TRAINERS, 0.05),
        lambda net: net.lose_no_more(TRAINERS),
        num_steps=200,
    )
    assert num_lost > 20
    record_injections(num_lost, f"packets; {poor}, on a good link {good}")


@pytest.mark.fault_row(8, "a link of 1 Mbit/s")
def test_a_slow_link_slows_training_and_breaks_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    num_held, good, poor = _hold(
        tmp_path,
        lambda net: net.slow_down(TRAINERS, "1mbit"),
        lambda net: net.slow_no_more(TRAINERS),
        num_steps=60,
    )
    assert num_held > 60
    # What was on its way before counts, too.
    assert poor["steps_per_s"] * STEP_BYTES < 1.5 * LINK_BYTES_PER_S
    assert poor["steps_per_s"] < good["steps_per_s"]
    record_injections(num_held, f"packets held back; {poor}, on a good link {good}")
