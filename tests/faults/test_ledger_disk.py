"""A disk that is full or fails: nothing is decided, nothing that was said is lost, all goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_schema import Kind, plan_of
from protos.client import AdminClient, healthy
from protos.errors import NotReady
from protos.retry import Retry
from protos.server import DECISIONS
from protos.types import PlanEvent
from tests.fakes_consumer import write_corpus
from tests.fakes_controller import ODM, join_request, make_report, run_document, write_index
from tests.fakes_driver import Worker
from tests.fakes_trainer import wait_until
from tests.faults.checker import check, missing_reports, read_evidence
from tests.faults.injectors import SystemCalls, fill, tiny_disk
from tests.faults.processes import FaultRun, Supervisor, fault_run, free_address, write_fault_run
from trainer_client.retry import until_answered

pytestmark = pytest.mark.slow

NUM_STEPS = 4000
RECOVERY_S = 5.0


def _fault(run: FaultRun) -> str:
    return run.status().ledger_fault


@pytest.mark.fault_row(20, "the ledger's disk is full")
@pytest.mark.timeout(180)
def test_a_full_disk_stops_decisions_and_nothing_else(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    with tiny_disk(tmp_path / "disk", num_bytes=3 << 20) as disk:
        run_file = write_fault_run(
            out,
            write_corpus(tmp_path / "data", documents=(600, 450, 300)),
            steps=NUM_STEPS,
            policy=ODM,
            control={"degraded_after_s": 0.5, "snapshot_every": 1000},
        )
        # The ledger alone: logs of the ranks go where there is room.
        (out / "ledger.sqlite").symlink_to(disk / "ledger.sqlite")
        with fault_run(run_file) as run:
            run.start_ranks(2, until=NUM_STEPS, step_s=0.02)
            run.wait_observed(10)
            ballast = fill(disk)
            wait_until(lambda: bool(_fault(run)), timeout_s=30)
            assert "disk is full" in _fault(run)
            decided, trained = run.status().observed_step, run.last_logged_step()
            assert healthy(run.address, timeout_s=5)
            assert not healthy(run.address, timeout_s=5, service=DECISIONS)
            with (
                closing(AdminClient(run.address)) as admin,
                pytest.raises(NotReady, match="disk is full"),
            ):
                admin.freeze()
            # Training goes on, under the last plan.
            wait_until(lambda: run.last_logged_step() > trained + 50, timeout_s=60)
            assert run.status().observed_step == decided
            ballast.unlink()
            freed_s = time.monotonic()
            wait_until(lambda: run.status().observed_step > decided, timeout_s=30)
            recovery_s = time.monotonic() - freed_s
            assert healthy(run.address, timeout_s=5, service=DECISIONS)
            run.wait_observed(run.last_logged_step() + 20)
            assert _fault(run) == ""
            assert run.controller.starts == []  # it was one process all the time
            for rank in run.ranks:
                rank.process.kill()
        assert check(out) == []
        evidence, _ = read_evidence(out)
        assert missing_reports(evidence) == 0
        mended = [
            row.body
            for row in evidence.rows
            if row.kind is Kind.EVENT and row.body["event"] == "ledger written again"
        ]
        assert len(mended) == 1
        assert "disk is full" in mended[0]["reason"]
    assert recovery_s < RECOVERY_S
    record_injections(1, f"deciding {recovery_s:.1f} s after space was there")


def _report_steps(worker: Worker, steps: range) -> list[PlanEvent]:
    heard = []
    for step in steps:
        worker.client.report(make_report(worker.spec, step=step), timeout_s=20)
        heard += worker.hear_through(step + 2)
    return heard


def _drive(tmp_path: Path, calls: SystemCalls) -> None:
    """Train some steps while a call fails; all that was heard must be in the ledger for good."""
    write_index(tmp_path / "index.parquet")
    address = free_address()
    document = run_document(tmp_path, address=address, policy=ODM)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(document, sort_keys=False))
    ledger = tmp_path / "out" / "ledger.sqlite"
    supervisor = Supervisor(run_file, log=tmp_path / "log", first_prefix=calls.prefix)
    try:
        supervisor.wait_ready()
        with closing(Worker(address)) as worker:
            until_answered(
                lambda left_s: worker.client.join(join_request(0, 1, timeout_s=left_s)),
                budget_s=30.0,
                retry=Retry(),
                wait=time.sleep,
            )
            heard = _report_steps(worker, range(6))
    finally:
        supervisor.close()
    with reading_ledger(ledger) as database:
        verify(database, ledger)
        rows = list(read_rows(database))
    plans = {plan.version: plan for plan in (plan_of(r) for r in rows if r.kind is Kind.PLAN)}
    for event in heard:
        for plan in event.plans[1:]:
            assert plans[plan.version] == plan
    sealed = max(row.step for row in rows if row.kind is Kind.SEAL)
    assert sealed >= max(event.sealed_through for event in heard)
    steps = [row.step for row in rows if row.kind is Kind.STEP]
    assert steps == list(range(6))


CALLS = [("fdatasync", "EIO"), ("pwrite64", "ENOSPC"), ("pwrite64", "EIO")]


def _fail_at(tmp_path: Path, call: str, error: str, when: int) -> int:
    calls = SystemCalls(tmp_path / "strace.log", call=call, error=error, when=str(when))
    _drive(tmp_path, calls)
    return calls.num_injected()


@pytest.mark.fault_row(21, "fsync or write of the ledger fails once")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("call", "error"), CALLS)
def test_a_call_that_fails_while_a_decision_is_written_costs_no_decision(
    tmp_path: Path, call: str, error: str, record_injections: Callable[..., None]
) -> None:
    injected = _fail_at(tmp_path, call, error, when=12 if call == "fdatasync" else 40)
    record_injections(injected)


@pytest.mark.long
@pytest.mark.fault_row(21, "fsync or write of the ledger fails, at each of many moments")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("call", "error"), CALLS)
def test_whichever_call_fails_no_decision_is_lost(
    tmp_path: Path, call: str, error: str, record_injections: Callable[..., None]
) -> None:
    moments = range(1, 21) if call == "fdatasync" else range(1, 80, 4)
    num_injected = 0
    for when in moments:
        folder = tmp_path / str(when)
        folder.mkdir()
        num_injected += _fail_at(folder, call, error, when)
    assert num_injected >= len(moments) // 2
    record_injections(num_injected, f"{call} {error} at {len(moments)} moments")
