"""At most one controller writes a ledger: the second is sent away, the frozen one is fenced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_schema import Kind
from protos.errors import ControllerUnreachable
from protos.types import PlanEvent
from tests.fakes_controller import ODM, join_request, make_report, run_document, write_index
from tests.fakes_driver import Worker
from tests.faults.processes import ControllerProcess, free_address

pytestmark = pytest.mark.slow

TAKEN_OVER_S = 5.0


def _write_run(folder: Path, name: str, **changes: Any) -> tuple[Path, str]:
    write_index(folder / "index.parquet")
    address = changes.setdefault("address", free_address())
    path = folder / f"{name}.yaml"
    document = run_document(folder, policy=ODM, **changes)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path, address


@contextmanager
def _controller(run_file: Path, *options: str) -> Iterator[ControllerProcess]:
    log = run_file.with_suffix(".log")
    controller = ControllerProcess(run_file, log=log, options=options)
    try:
        yield controller
    finally:
        controller.process.kill()
        controller.wait()


def _train(worker: Worker, steps: range) -> list[PlanEvent]:
    heard = []
    for step in steps:
        worker.client.report(make_report(worker.spec, step=step))
        heard += worker.hear_through(step + 2)
    return heard


@pytest.mark.fault_row(3, "controller frozen while another takes over, then awake again")
@pytest.mark.timeout(120)
def test_a_frozen_controller_that_wakes_up_finds_itself_fenced(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    old_run, old_address = _write_run(tmp_path, "old")
    new_run, new_address = _write_run(tmp_path, "new")
    ledger = tmp_path / "out" / "ledger.sqlite"
    with _controller(old_run) as old:
        old.wait_ready()
        with closing(Worker(old_address)) as worker:
            worker.client.join(join_request(0, 1))
            old_epoch = _train(worker, range(4))[-1].epoch
            os.kill(old.pid, signal.SIGSTOP)
            # The lock is lost to it, as on storage that is attached elsewhere meanwhile.
            ledger.with_name(f"{ledger.name}.lock").unlink()
            with _controller(new_run) as new:
                new.wait_ready()
                with closing(Worker(new_address)) as other:
                    heard = other.hear_through(5)
                    assert heard[-1].epoch > old_epoch
                    _train(other, range(4, 7))
                    os.kill(old.pid, signal.SIGCONT)
                    # Somebody still believes in the old one; what it decides must not count.
                    worker.client.report(make_report(worker.spec, step=4))
                    assert old.wait(20) == 3
                    assert "was taken over by another controller" in old.said()
                    with pytest.raises(ControllerUnreachable):
                        worker.client.report(make_report(worker.spec, step=5))
                    _train(other, range(7, 9))
    with reading_ledger(ledger) as database:
        verify(database, ledger)
        steps = [row.step for row in read_rows(database, Kind.STEP)]
    assert steps == list(range(9))
    record_injections(1)


@pytest.mark.fault_row(4, "a standby beside a controller that is killed")
@pytest.mark.timeout(120)
def test_a_standby_takes_over_within_seconds(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    run_file, address = _write_run(tmp_path, "run")
    with _controller(run_file) as active:
        active.wait_ready()
        with closing(Worker(address)) as worker:
            worker.client.join(join_request(0, 1))
            _train(worker, range(4))
        with _controller(run_file, "--standby") as standby:
            while "standing by" not in standby.said():
                assert standby.process.poll() is None
                time.sleep(0.05)
            active.process.kill()
            killed_s = time.monotonic()
            standby.wait_ready()
            with closing(Worker(address)) as worker:
                _train(worker, range(4, 8))
            taken_over_s = time.monotonic() - killed_s
            assert "takes over" in standby.said()
            standby.process.send_signal(signal.SIGTERM)
            assert standby.wait(20) == 0
    assert taken_over_s < TAKEN_OVER_S
    record_injections(1, f"four decisions {taken_over_s:.1f} s after the kill")


def test_a_standby_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    run_file, _ = _write_run(tmp_path, "run")
    with _controller(run_file) as active:
        active.wait_ready()
        with _controller(run_file, "--standby") as standby:
            while "standing by" not in standby.said():
                assert standby.process.poll() is None
                time.sleep(0.05)
            standby.process.send_signal(signal.SIGTERM)
            assert standby.wait(20) == 0
        assert active.process.poll() is None
