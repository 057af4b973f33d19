"""A controller short of descriptors, besieged by clients, with a clock that jumps: it serves."""

from __future__ import annotations

import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import yaml

from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_schema import Kind, Row
from protos.channel import CLIENT_OPTIONS
from protos.client import AdminClient
from protos.retry import Retry
from tests.fakes_controller import ODM, join_request, make_report, run_document, write_index
from tests.fakes_driver import Worker
from tests.fakes_security import call
from tests.faults.processes import Supervisor, free_address
from trainer_client.retry import until_answered

pytestmark = pytest.mark.slow

STATUS = "/headrace.v1.Admin/Status"
OWN = [("grpc.use_local_subchannel_pool", 1)]
NUM_CLIENTS = 256
STORM_S = 2.0
"""Of 100 clients that come at once, 99 are answered within."""


@contextmanager
def _supervised(
    folder: Path, *, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Supervisor, str]]:
    write_index(folder / "index.parquet")
    address = free_address()
    document = run_document(folder, address=address, policy=ODM, steps=400)
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(document, sort_keys=False))
    supervisor = Supervisor(
        run_file,
        log=folder / "log",
        first_prefix=prefix,
        environments=[environment] if environment is not None else [],
    )
    try:
        supervisor.wait_ready()
        yield supervisor, address
    finally:
        supervisor.close()


def _train(worker: Worker, steps: range) -> None:
    for step in steps:
        worker.client.report(make_report(worker.spec, step=step))
        worker.hear_through(step + 2)


def _rows(folder: Path, *kinds: Kind) -> list[Row]:
    ledger = folder / "out" / "ledger.sqlite"
    with reading_ledger(ledger) as database:
        verify(database, ledger)
        return list(read_rows(database, *kinds))


@pytest.mark.fault_row(34, "no descriptors are left to the controller")
@pytest.mark.timeout(120)
def test_a_controller_without_descriptors_serves_those_it_has_and_then_all(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    limit = 64
    prefix = ["prlimit", f"--nofile={limit}", "--"]
    with _supervised(tmp_path, prefix=prefix) as (supervisor, address):
        process = psutil.Process(supervisor.current.pid)
        with closing(Worker(address)) as worker:
            worker.client.join(join_request(0, 1))
            _train(worker, range(3))
            host, port = address.rsplit(":", 1)
            with ExitStack() as stack:
                for _ in range(2 * limit):
                    one = stack.enter_context(socket.create_connection((host, int(port)), 5))
                    one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                deadline = time.monotonic() + 20
                while process.num_fds() < limit - 2:
                    assert time.monotonic() < deadline, process.num_fds()
                    time.sleep(0.05)
                # A snapshot of the policy falls due among these: its file cannot be opened.
                _train(worker, range(3, 12))
                assert supervisor.starts == []
            deadline = time.monotonic() + 30
            while process.num_fds() > limit // 2 + 10:
                assert time.monotonic() < deadline, process.num_fds()
                time.sleep(0.05)
            with closing(AdminClient(address)) as admin:
                assert admin.status().observed_step == 11
                assert Path(admin.snapshot_policy()).is_file()
            _train(worker, range(12, 15))
        assert supervisor.starts == []
    assert [row.step for row in _rows(tmp_path, Kind.STEP)] == list(range(15))
    record_injections(1, f"{2 * limit} connections against {limit} descriptors")


@pytest.mark.fault_row(35, "256 clients reconnect at once")
@pytest.mark.timeout(180)
def test_a_storm_of_reconnecting_clients_is_answered_while_decisions_go_on(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with _supervised(tmp_path) as (supervisor, address), ExitStack() as stack:
        # Each with a connection of its own, and gRPC's back-off bounded as our clients bound it.
        clients = [
            stack.enter_context(grpc.insecure_channel(address, options=[*OWN, *CLIENT_OPTIONS]))
            for _ in range(NUM_CLIENTS)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(NUM_CLIENTS))
        with closing(Worker(address)) as worker:
            worker.client.join(join_request(0, 1))
            _train(worker, range(4))
            answers = [call(client, STATUS, timeout_s=30)[0] for client in clients]
            assert set(answers) == {grpc.StatusCode.OK}
        supervisor.kill()
        together = threading.Barrier(NUM_CLIENTS + 1)

        def come_back(client: grpc.Channel) -> float:
            together.wait(60)
            deadline = time.monotonic() + 60
            while call(client, STATUS, timeout_s=10)[0] is not grpc.StatusCode.OK:
                assert time.monotonic() < deadline
                time.sleep(random.uniform(0.05, 0.5))
            return time.monotonic()

        coming = [pool.submit(come_back, client) for client in clients]
        together.wait(60)  # all knock before the door is open
        supervisor.wait_ready()
        opened_s = supervisor.current.ready_s
        assert opened_s is not None
        again = until_answered(
            lambda left_s: Worker(address), budget_s=30, retry=Retry(), wait=time.sleep
        )
        with closing(again) as worker:
            _train(worker, range(4, 20))
        waits = np.array([done.result() - opened_s for done in coming])
    assert [row.step for row in _rows(tmp_path, Kind.STEP)] == list(range(20))
    p99 = float(np.percentile(waits, 99))
    assert p99 < STORM_S, p99
    record_injections(NUM_CLIENTS, f"answered p99 {p99:.2f} s after the controller was back")


def _faketime() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found or shutil.which("faketime") is None:
        pytest.skip("libfaketime is not installed: apt-get install faketime")
    return str(found[0])


@pytest.mark.long
@pytest.mark.fault_row(32, "the controller's clock jumps, and differs from the workers'")
@pytest.mark.timeout(120)
def test_a_clock_that_jumps_loses_no_worker_and_no_step(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    clock = tmp_path / "clock"
    environment = {
        "LD_PRELOAD": _faketime(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    jumps = ["+0", "+3h", "-10m", "+1d", "-2h"]
    clock.write_text(jumps[0])
    with (
        _supervised(tmp_path, environment=environment) as (supervisor, address),
        closing(Worker(address)) as worker,
    ):
        worker.client.join(join_request(0, 1))
        for number, jump in enumerate(jumps):
            clock.write_text(jump)
            _train(worker, range(4 * number, 4 * number + 4))
        with closing(AdminClient(address)) as admin:
            status = admin.status()
        assert (status.generation, status.degraded_steps, status.missing_reports) == (1, 0, 0)
        assert supervisor.starts == []
    rows = _rows(tmp_path)
    assert [row.step for row in rows if row.kind is Kind.STEP] == list(range(4 * len(jumps)))
    events = [row.body["event"] for row in rows if row.kind is Kind.EVENT]
    assert "worker lost" not in events
    # The clock did jump: the ledger has its times as the controller saw them.
    times = [row.time_s for row in rows if row.kind is Kind.STEP]
    leaps = [abs(after - before) > 300 for before, after in zip(times, times[1:], strict=False)]
    assert sum(leaps) == len(jumps) - 1
    record_injections(len(jumps) - 1, "+3 h, back to -10 min, +1 day, back to -2 h")
