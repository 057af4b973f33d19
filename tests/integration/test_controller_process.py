"""A controller as a process of its own: called over gRPC, killed, started again, started twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from controller.ledger import reading_ledger, verify
from protos.client import AdminClient, healthy
from protos.errors import ControllerUnreachable, InvalidMessage, StaleGeneration, UnknownDomain
from tests.fakes_controller import (
    ODM,
    join_request,
    make_report,
    run_document,
    write_index,
)
from tests.fakes_driver import Worker

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[2]
_END_S = 20.0


def _write_run(folder: Path, **changes: Any) -> Path:
    document = run_document(folder, **changes)
    write_index(folder / "index.parquet")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def _start(run_file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "controller", str(run_file)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def _controller(run_file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a controller for as long as the block lasts; yield the process and its address."""
    with _start(run_file) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            yield process, line.split()[-1]
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(_END_S)


def _outcome(run_file: Path) -> tuple[int, str]:
    """Return the exit code and what was said of a controller that cannot start."""
    with _start(run_file) as process:
        _, said = process.communicate(timeout=_END_S)
    return process.returncode, said


def test_ranks_workers_and_an_operator_are_served_over_the_wire(tmp_path: Path) -> None:
    with _controller(_write_run(tmp_path, policy=ODM)) as (process, address):
        assert healthy(address, timeout_s=5)
        worker, admin = Worker(address), AdminClient(address)
        with closing(worker), closing(admin):
            client = worker.client
            answers: list[Any] = [None, None]

            def join(rank: int) -> None:
                answers[rank] = client.join(join_request(rank, 2))

            joining = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
            for thread in joining:
                thread.start()
            for thread in joining:
                thread.join(_END_S)
            assert [answer.generation for answer in answers] == [1, 1]
            for step in range(6):
                for rank in range(2):
                    client.report(make_report(worker.spec, rank=rank, world_size=2, step=step))
                heard = worker.hear_through(step + 2)
                assert all(plan.first_step <= step + 2 for plan in heard[-1].plans)
            status = admin.status()
            assert (status.observed_step, status.sealed_through, status.world_size) == (5, 7, 2)
            with pytest.raises(StaleGeneration):
                client.report(make_report(worker.spec, generation=9))
            nan = np.full(3, np.nan)
            with pytest.raises(InvalidMessage, match="rank 0, step 6: loss_sum"):
                client.report(make_report(worker.spec, world_size=2, step=6, loss_sum=nan))
            with pytest.raises(UnknownDomain, match="wbe"):
                admin.set_mixture({"wbe": 1.0})
            assert admin.set_mixture({"web": 1.0}) == 8
            assert Path(admin.snapshot_policy()).is_file()
        process.send_signal(signal.SIGTERM)
        assert process.wait(_END_S) == 0


def test_a_killed_controller_comes_back_with_the_plans_that_it_announced(tmp_path: Path) -> None:
    run_file = _write_run(tmp_path, policy=ODM)
    with _controller(run_file) as (process, address):
        worker = Worker(address)
        with closing(worker):
            worker.client.join(join_request(0, 1))
            heard = []
            for step in range(8):
                worker.client.report(make_report(worker.spec, step=step))
                heard += worker.hear_through(step + 2)
            process.send_signal(signal.SIGKILL)
            process.wait(_END_S)
            with pytest.raises(ControllerUnreachable):
                worker.client.report(make_report(worker.spec, step=8))
    announced = {plan.first_step: plan for event in heard for plan in event.plans}
    with _controller(run_file) as (_, address):
        worker = Worker(address)
        with closing(worker):
            (event,) = worker.hear_through(9)
            assert (event.generation, event.sealed_through, event.reset) == (1, 9, True)
            for plan in event.plans[1:]:
                assert plan == announced[plan.first_step]
            # The ranks know nothing of it all and go on where they are.
            assert worker.client.report(make_report(worker.spec, step=8)).counted
            worker.hear_through(10)


@pytest.mark.fault_row(4, "two controllers started on one ledger")
def test_a_second_controller_is_told_who_holds_the_ledger(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    run_file = _write_run(tmp_path)
    with _controller(run_file) as (process, _):
        code, said = _outcome(run_file)
        assert code == 3
        assert f"held by process {process.pid}" in said
        assert len(said.splitlines()) == 1
        record_injections(1)


@pytest.mark.fault_row(4, "two controllers started on one port")
def test_a_second_controller_on_a_port_writes_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with _controller(_write_run(tmp_path)) as (_, address):
        other = tmp_path / "other"
        code, said = _outcome(_write_run(other, address=address))
        assert code == 3
        assert address in said
        assert len(said.splitlines()) == 1
        assert not (other / "out").exists()
        record_injections(1)


def test_what_keeps_a_controller_from_starting_is_one_sentence_and_a_code(tmp_path: Path) -> None:
    run_file = _write_run(tmp_path)
    with _controller(run_file):
        pass
    ledger = tmp_path / "out" / "ledger.sqlite"
    with reading_ledger(ledger) as database:
        assert verify(database, ledger)[0] > 0
    changed = run_document(tmp_path, seed=8)
    run_file.write_text(yaml.safe_dump(changed, sort_keys=False))
    assert _one_line(run_file) == 2
    run_file.write_text("polcy: 1")
    assert _one_line(run_file) == 2
    index = tmp_path / "index.parquet"
    run_file = _write_run(tmp_path)
    index.write_bytes(b"no index")
    assert _one_line(run_file) == 4
    write_index(index)
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE ledger SET body = '{}' WHERE seq = 1")
    assert _one_line(run_file) == 5


def _one_line(run_file: Path) -> int:
    code, said = _outcome(run_file)
    assert len(said.splitlines()) == 1, said
    assert said.startswith("headrace controller: ")
    assert str(os.getpid()) not in said
    return code
