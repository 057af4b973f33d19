"""What is read from a ledger: figures, plots, lines on a screen."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind
from deploy.plots import ALIGNMENT_PLOT, LOSS_PLOT, MIXTURE_PLOT, draw_plots, mixture_by_step
from deploy.progress import Progress
from deploy.record import read_record
from deploy.screen import status_line
from protos.errors import LedgerError
from protos.status import RunStatus, WorkerStatus
from protos.types import Mixture
from tests.fakes_deploy import DOMAINS, GLOBAL_SEQUENCES, write_ledger

NUM_STEPS = 40


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    write_ledger(path, num_steps=NUM_STEPS)
    return path


def test_a_record_holds_the_plans_and_steps_of_its_ledger(ledger: Path) -> None:
    record = read_record(ledger)
    assert len(record.plans) == NUM_STEPS // 5
    assert sorted(record.steps) == list(range(NUM_STEPS))
    assert record.mixture_lag_steps() == 2
    assert record.tokens() == NUM_STEPS * GLOBAL_SEQUENCES * 32
    steps, losses = record.loss()
    assert losses.shape == (len(steps), len(DOMAINS))
    assert np.nanmean(losses[:5]) > np.nanmean(losses[-5:])


def test_a_fork_leaves_the_abandoned_steps_out(ledger: Path) -> None:
    with Ledger(ledger, now=lambda: 1e6) as writing:
        writing.commit([Entry(kind=Kind.FORK, step=25, body={})])
    record = read_record(ledger)
    assert sorted(record.steps) == list(range(25))
    assert record.num_forks == 1


def test_a_ledger_that_was_changed_is_refused(ledger: Path) -> None:
    content = bytearray(ledger.read_bytes())
    at = content.index(b'"planned"')
    content[at + 1 : at + 8] = b"PLANNED"
    ledger.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged"):
        read_record(ledger)


def test_plots_are_drawn_and_mixtures_are_those_of_the_plans(ledger: Path, tmp_path: Path) -> None:
    record = read_record(ledger)
    drawn = draw_plots(record, DOMAINS, tmp_path, title="test")
    assert {path.name for path in drawn} == {MIXTURE_PLOT, LOSS_PLOT, ALIGNMENT_PLOT}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    _, shares = mixture_by_step(record)
    for plan in record.plans:
        assert shares[plan.first_step].tolist() == list(plan.mixture.shares)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_ledger_without_steps_draws_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.sqlite"
    write_ledger(path, num_steps=0)
    assert draw_plots(read_record(path), DOMAINS, tmp_path, title="test") == []


def worker(number: int, *, alive: bool) -> WorkerStatus:
    return WorkerStatus(
        worker_id=f"worker-{number}",
        endpoint=f"127.0.0.1:{9000 + number}",
        alive=alive,
        lanes=(number,),
        cache_bytes=0,
        stall_s=0.0,
        sequences_served=10,
    )


STATUS = RunStatus(
    run_id="test",
    policy="acodm",
    policy_phase="acting",
    phase="running",
    domains=DOMAINS,
    mixture=Mixture.from_shares((0.5, 0.25, 0.25)),
    plan_version=3,
    observed_step=9,
    sealed_through=11,
    num_steps=40,
    generation=1,
    world_size=2,
    loss=(2.0, 3.0, float("nan")),
    tokens=1000,
    tokens_per_s=123.4,
    data_wait_share=0.01,
    degraded_steps=0,
    missing_reports=0,
    held_decisions=0,
    decision_ms_p50=1.0,
    decision_ms_p99=2.0,
    frozen=False,
    quarantines=(),
    workers=(worker(0, alive=True), worker(1, alive=True)),
)


def shown(statuses: list[RunStatus], *, terminal: bool) -> str:
    screen = io.StringIO()
    seconds = iter(range(0, 1000, 100))
    console = Console(file=screen, force_terminal=terminal, width=100)
    with Progress(console, now=lambda: next(seconds)) as progress:
        for status in statuses:
            progress.show(status)
    return screen.getvalue()


def test_a_status_is_a_line_without_a_terminal() -> None:
    assert status_line(STATUS) == (
        "step 10/40 · acodm acting · loss 2.500 · 123 tokens/s · code 50% web 25% prose 25%"
    )
    assert shown([STATUS], terminal=False).splitlines() == [status_line(STATUS)]


def test_a_status_is_a_table_with_bars_in_a_terminal() -> None:
    text = shown([STATUS], terminal=True)
    assert "█" * 24 in text
    assert "worker-1" in text


def test_workers_that_come_and_go_are_said_once() -> None:
    one_gone = replace(STATUS, workers=(worker(0, alive=True), worker(1, alive=False)))
    lines = shown([STATUS, one_gone, one_gone, STATUS, STATUS], terminal=False).splitlines()
    said = [line for line in lines if line.startswith("the controller")]
    assert said == [
        "the controller has lost loader worker worker-1",
        "the controller has loader worker worker-1 again",
    ]
