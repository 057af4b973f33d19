"""Told to stop at any moment, a controller and a worker end within seconds and leave nothing."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from controller.ledger import reading_ledger, verify
from deploy.record import LEDGER
from tests.fakes_consumer import WorkerProcess, write_corpus
from tests.faults.processes import ControllerProcess, write_fault_run

pytestmark = pytest.mark.slow

WITHIN_S = 5.0
LATEST_S = 5.0
"""After the start, when both serve already."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _stop_at_random(folder: Path, draw: random.Random, *, moment_s: float) -> list[float]:
    """Start both, stop them after a while, twice now and then; return how long each took."""
    run_file = write_fault_run(folder, write_corpus(folder.parent / f"data-{folder.name}"))
    controller = ControllerProcess(run_file, log=folder / "controller.log")
    address = run_file.read_text().partition("address: ")[2].split("\n")[0]
    cache = folder / "cache"
    worker = WorkerProcess(address, "w0", cache=cache, log=folder / "w0.log", drain_s=1.0)
    took: list[float] = []
    below: list[psutil.Process] = []
    try:
        time.sleep(moment_s)  # the moment itself
        for process in (worker.process, controller.process):
            below += psutil.Process(process.pid).children(recursive=True)
        number = draw.choice(SIGNALS)
        for process in (worker.process, controller.process):
            told_s = time.monotonic()
            process.send_signal(number)
            if draw.random() < 0.3:
                process.send_signal(number)
            status = process.wait(60)
            took.append(time.monotonic() - told_s)
            # Before it has taken the signals, while Python starts, they end it as they end any.
            assert status in (0, -number, 130, 1 if number == signal.SIGINT else 0), status
    finally:
        for process in (worker.process, controller.process):
            process.kill()
            process.wait(60)
    assert not [each for each in below if each.is_running()]
    if cache.exists():
        assert not [path for path in cache.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    if (folder / LEDGER).exists() and (folder / LEDGER).stat().st_size:
        with reading_ledger(folder / LEDGER) as database:
            verify(database, folder / LEDGER)
    return took


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Undo what a shell does to background jobs: it has them, and all they start, ignore SIGINT."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def _stop_often(tmp_path: Path, moments: int, record: Callable[..., None]) -> None:
    draw = random.Random(moments)
    took = []
    for number in range(moments):
        # Spread evenly: while Python starts, while it joins, while it serves.
        moment_s = LATEST_S * (number + draw.random()) / moments
        took += _stop_at_random(tmp_path / str(number), draw, moment_s=moment_s)
    took.sort()
    assert took[-1] <= WITHIN_S
    record(
        len(took), f"ended after {took[len(took) // 2]:.2f} s (median), {took[-1]:.2f} s at most"
    )


@pytest.mark.fault_row(37, "SIGTERM or SIGINT, once or twice, to controller and worker")
@pytest.mark.timeout(120)
def test_told_to_stop_they_end_within_seconds_and_leave_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    _stop_often(tmp_path, 2, record_injections)


@pytest.mark.long
@pytest.mark.fault_row(37, "SIGTERM or SIGINT to controller and worker at 50 moments")
@pytest.mark.timeout(600)
def test_told_to_stop_at_50_moments_they_end_within_seconds_and_leave_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    _stop_often(tmp_path, 50, record_injections)
