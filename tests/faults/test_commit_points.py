"""A controller that dies before or after any durable write comes back to a run that is whole.

The places are read from the registry: one that is new and not covered here fails a test.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml

import controller.app
from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_schema import Kind
from protos.client import AdminClient
from protos.errors import HeadraceError
from protos.failpoints import VARIABLE, places
from tests.fakes_consumer import write_corpus
from tests.fakes_controller import join_request, run_document, write_index
from tests.fakes_driver import Worker
from tests.fakes_trainer import wait_until
from tests.faults.checker import check, missing_reports, read_evidence
from tests.faults.processes import (
    FaultRun,
    Supervisor,
    fault_run,
    free_address,
    write_fault_run,
)

pytestmark = pytest.mark.slow

# How often a controller comes by before it dies; several arm the way to the place as well.
LIVE: dict[str, str] = {
    "ledger.run.before": "1",
    "ledger.run.after": "1",
    "ledger.generation.before": "1",
    "ledger.generation.after": "1",
    "reply.join": "1",
    "ledger.notes.before": "1",
    "ledger.notes.after": "1",
    "ledger.rows": "4",
    "ledger.decision.before": "3",
    "ledger.decision.after": "3",
    "plans.broadcast": "4",
    "plans.told": "5",
    "reply.report": "5",
    "ledger.snapshot.before": "1",
    "ledger.snapshot.after": "1",
    "policy.written": "1",
    "policy.rename.before": "1",
    "policy.rename.after": "1",
    "ledger.prune.before": "1",
    "ledger.prune.after": "1",
    "ledger.control.before": "1",
    "ledger.control.after": "1",
    "reply.admin": "1",
    "ledger.recovery.before": "1:kill,ledger.decision.before:2:ENOSPC",
    "ledger.recovery.after": "1:kill,ledger.decision.after:2:EIO",
}

ELSEWHERE = {"ledger.skip.before", "ledger.skip.after"}
"""Covered by a test of their own, since ranks that live do not come by."""

IN_DOUBT = {"ledger.amend.before", "ledger.amend.after"}
"""Covered in `tests.faults.test_in_doubt`: workers must have gone on alone before."""

NUM_STEPS = 4000
ODM = {"name": "odm", "warmup_steps": 4}


def _environment(name: str) -> dict[str, str]:
    nth = LIVE[name]
    return {VARIABLE: f"{name}:{nth}" if ":" in nth else f"{name}:{nth}:kill"}


def test_every_commit_point_of_the_controller_is_killed_at() -> None:
    assert controller.app
    ours = {name for name in places() if re.match(r"ledger|plans|reply|policy", name)}
    assert ours == LIVE.keys() | ELSEWHERE | IN_DOUBT


@contextmanager
def _steering(run: FaultRun) -> Iterator[None]:
    """Freeze and resume over and over: orders are committed and answered all the time."""
    over = threading.Event()

    def work() -> None:
        admin = AdminClient(run.address)
        while not over.wait(0.2):
            for order in (admin.freeze, admin.resume):
                try:
                    order(timeout_s=1.0)
                except HeadraceError:
                    continue
        admin.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(20)


def _until(condition: Callable[[], bool], run: FaultRun) -> None:
    while not condition():
        assert run.are_training(), run.ranks[0].log.read_text()
        threading.Event().wait(0.05)


@pytest.mark.long
@pytest.mark.fault_row(2, "controller SIGKILL at each failpoint")
@pytest.mark.timeout(240)
def test_a_controller_killed_at_every_commit_point_loses_doubles_and_breaks_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    run_file = write_fault_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data", documents=(600, 450, 300)),
        steps=NUM_STEPS,
        policy=ODM,
        control={"snapshot_every": 5},
        ledger={"keep_steps": 10},
    )
    environments = [_environment(name) for name in LIVE]
    with fault_run(run_file, environments=environments) as run, _steering(run):
        run.start_ranks(2, until=NUM_STEPS, step_s=0.02)
        _until(lambda: len(run.controller.starts) >= len(LIVE), run)
        run.controller.wait_ready()
        run.wait_observed(run.last_logged_step() + 20)
        for rank in run.ranks:
            rank.process.kill()
        said = run.controller.current.said()
    killed = [start.exit_status for start in run.controller.starts[: len(LIVE)]]
    assert killed == [-signal.SIGKILL] * len(LIVE)
    hits = re.findall(r"^failpoint (\S+) hit: kill$", said, flags=re.MULTILINE)
    assert hits == list(LIVE)
    assert check(run.out) == []
    evidence, _ = read_evidence(run.out)
    record_injections(len(hits), f"{len(evidence.rows)} rows, {missing_reports(evidence)} missing")


@pytest.mark.fault_row(2, "controller SIGKILL around a commit of steps that nobody reported")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", sorted(ELSEWHERE))
def test_a_controller_killed_while_it_passes_over_silent_steps_comes_back(
    tmp_path: Path, place: str, record_injections: Callable[..., None]
) -> None:
    write_index(tmp_path / "index.parquet")
    run_file = tmp_path / "run.yaml"
    address = free_address()
    document = run_document(tmp_path, address=address)
    run_file.write_text(yaml.safe_dump(document, sort_keys=False))
    environments = [{VARIABLE: f"{place}:1:kill"}]
    supervisor = Supervisor(run_file, log=tmp_path / "log", environments=environments)
    try:
        supervisor.wait_ready()
        with closing(Worker(address)) as worker:
            worker.client.join(join_request(0, 1))
            # It trained steps 0 to 6 alone, and its reports of them were lost.
            worker.say(generation=1, composed_through=6, needed_step=7)
            wait_until(lambda: bool(supervisor.starts), timeout_s=20)
        supervisor.wait_ready()
        ledger = tmp_path / "out" / "ledger.sqlite"
        with closing(Worker(address, generation=1, composed_through=6, needed_step=7)) as worker:
            assert worker.hear_through(7)[-1].sealed_through >= 7
            with reading_ledger(ledger) as database:
                verify(database, ledger)
                skips = [(row.body["first"], row.step) for row in read_rows(database, Kind.SKIP)]
            # Once, whichever of the two controllers wrote it.
            assert skips == [(0, 5)]
    finally:
        supervisor.close()
    (killed, *_) = supervisor.starts
    assert killed.exit_status == -signal.SIGKILL
    assert f"failpoint {place} hit: kill" in (tmp_path / "log").read_text()
    record_injections(1)
