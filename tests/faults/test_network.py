"""A network that delays, breaks, or goes silent between ranks, workers and controller.

Ranks and workers reach the controller through a proxy; where batches are the matter, ranks reach
the workers through one, too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.history import read_deliveries
from deploy.training import RECEIVED
from tests.fakes_consumer import DOMAINS, global_batches, write_corpus
from tests.faults.checker import check, longest_wait_s, missing_reports, read_evidence
from tests.faults.processes import FaultRun, fault_run, free_address, write_fault_run
from tests.faults.tcp_proxy import FaultProxy, Weather

pytestmark = pytest.mark.slow

STEP_S = 0.1
LAG = 150
"""15 seconds' worth of steps decided ahead: longer than any silence here."""

CLEAR = Weather()


@contextmanager
def _run_behind_a_proxy(tmp_path: Path, **changes: Any) -> Iterator[tuple[FaultRun, FaultProxy]]:
    patterns = write_corpus(tmp_path / "data", documents=(400, 300, 200))
    settings: dict[str, Any] = {
        "steps": 100_000,
        "policy": {"name": "odm", "warmup_steps": 10},
        "control": {"lag": LAG, "snapshot_every": 25},
        **changes,
    }
    run_file = write_fault_run(tmp_path / "run", patterns, **settings)
    with fault_run(run_file, num_workers=0) as run:
        run.controller.wait_ready()
        with FaultProxy(run.address, seed=1) as proxy:
            run.address = proxy.address
            run.add_worker("w0")
            run.add_worker("w1")
            yield run, proxy


def _train_on(run: FaultRun, steps: int) -> None:
    """Wait until the ranks have trained so many more steps, all of which are decided upon."""
    run.wait_observed(max(run.last_logged_step(), 0) + steps)
    assert run.are_training(), run.ranks[0].log.read_text()[-2000:]


def _assert_nothing_was_lost(run: FaultRun) -> None:
    last = run.last_logged_step()
    run.wait_observed(last)
    for rank in run.ranks:
        rank.process.kill()
        rank.process.wait(30)
    assert check(run.out) == []
    evidence, _ = read_evidence(run.out)
    assert missing_reports(evidence) == 0
    assert not any(event["degraded"] for event in evidence.events if event["event"] == "step")
    assert len(run.controller.starts) == 0, "the controller was restarted"


@pytest.mark.long
@pytest.mark.fault_row(9, "messages delayed by 0.2 to 0.8 s, overtaking one another")
@pytest.mark.timeout(180)
def test_delayed_messages_lose_nothing_and_no_older_plan_comes_into_force(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with _run_behind_a_proxy(tmp_path) as (run, proxy):
        run.start_ranks(2, until=100_000, step_s=STEP_S)
        run.wait_observed(5)
        proxy.become(Weather(delay_s=0.5, jitter_s=0.3))
        _train_on(run, 40)
        proxy.become(CLEAR)
        _assert_nothing_was_lost(run)
        assert proxy.counts.delayed > 40
        record_injections(proxy.counts.delayed)


@pytest.mark.fault_row(10, "connections to the controller reset, or broken in mid-message")
@pytest.mark.timeout(180)
def test_broken_connections_to_the_controller_are_made_anew_and_lose_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    draw = random.Random(3)
    with _run_behind_a_proxy(tmp_path) as (run, proxy):
        run.start_ranks(2, until=100_000, step_s=STEP_S)
        run.wait_observed(5)
        for number in range(6):
            if number % 2:
                proxy.cut_short(2)
            else:
                assert proxy.reset_all() > 0
            _train_on(run, draw.randrange(3, 10))
        _assert_nothing_was_lost(run)
        counts = proxy.counts
        assert counts.resets >= 3
        assert counts.cut_short >= 3
        # Broken connections are given up on both sides: two ranks, two workers, this test.
        assert proxy.num_open() <= 12
        record_injections(counts.resets + counts.cut_short)


@pytest.mark.parametrize(
    ("silence", "what"),
    [
        pytest.param(
            Weather(silent_to_server=True, silent_to_client=True),
            "both ways",
            marks=[
                pytest.mark.long,
                pytest.mark.fault_row(5, "the controller's host out of reach for 8 s, no RST"),
            ],
        ),
        pytest.param(
            Weather(silent_to_client=True),
            "answers",
            marks=[
                pytest.mark.long,
                pytest.mark.fault_row(6, "calls arrive, answers are lost for 8 s"),
            ],
        ),
    ],
    ids=["both-ways", "answers-lost"],
)
@pytest.mark.timeout(180)
def test_no_step_waits_for_a_controller_out_of_reach_and_no_report_counts_twice(
    tmp_path: Path, record_injections: Callable[..., None], silence: Weather, what: str
) -> None:
    with _run_behind_a_proxy(tmp_path) as (run, proxy):
        run.start_ranks(2, until=100_000, step_s=STEP_S)
        run.wait_observed(LAG // 3)
        before = run.last_logged_step()
        proxy.become(silence)
        time.sleep(8.0)  # the fault itself
        trained = run.last_logged_step() - before
        proxy.become(CLEAR)
        assert trained >= 0.5 * 8.0 / STEP_S, f"{trained} steps in 8 s of silence ({what})"
        _train_on(run, 10)
        _assert_nothing_was_lost(run)
        evidence, _ = read_evidence(run.out)
        assert longest_wait_s(evidence, after_step=before) < 2.0
        assert proxy.counts.held > 0
        record_injections(1, f"{trained} steps meanwhile")


@pytest.mark.long
@pytest.mark.fault_row(7, "5 s of silence in every 15 s, six times")
@pytest.mark.timeout(300)
def test_blackouts_that_come_again_and_again_lose_nothing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with _run_behind_a_proxy(tmp_path) as (run, proxy):
        run.start_ranks(2, until=100_000, step_s=STEP_S)
        run.wait_observed(LAG // 3)
        for _ in range(6):
            held = proxy.counts.held
            proxy.become(Weather(silent_to_server=True, silent_to_client=True))
            time.sleep(5.0)  # the fault itself
            proxy.become(CLEAR)
            assert proxy.counts.held > held
            time.sleep(10.0)  # the time between two of them
        _train_on(run, 10)
        _assert_nothing_was_lost(run)
        record_injections(6)


@pytest.mark.long
@pytest.mark.fault_row(10, "streams of batches reset, or broken in mid-batch")
@pytest.mark.timeout(180)
def test_a_stream_that_breaks_in_mid_batch_delivers_no_half_batch_and_none_twice(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    patterns = write_corpus(tmp_path / "data", documents=(400, 300, 200))
    settings: dict[str, Any] = {"steps": 100_000, "policy": {"name": "natural"}}
    batches = []
    injected = 0
    for name, disturb in (("calm", False), ("broken", True)):
        run_file = write_fault_run(tmp_path / name, patterns, **settings)
        with ExitStack() as stack:
            run = stack.enter_context(fault_run(run_file, num_workers=0))
            run.controller.wait_ready()
            proxies = [stack.enter_context(_proxied_worker(run, f"w{each}")) for each in range(2)]
            run.start_ranks(2, until=120, step_s=0.05)
            draw = random.Random(5)
            while disturb and run.are_training() and run.last_logged_step() < 100:
                proxy = draw.choice(proxies)
                proxy.cut_short(1)
                proxy.reset_all()
                reached = run.last_logged_step() + draw.randrange(4, 12)
                while run.are_training() and run.last_logged_step() < reached:
                    time.sleep(0.02)
            run.wait_ranks(120)
            injected += sum(proxy.counts.resets + proxy.counts.cut_short for proxy in proxies)
        assert check(run.out) == []
        batches.append(global_batches(read_deliveries(run.out / RECEIVED, DOMAINS)))
    assert injected >= 8
    assert batches[0] == batches[1]
    record_injections(injected)


@contextmanager
def _proxied_worker(run: FaultRun, worker_id: str) -> Iterator[FaultProxy]:
    """Start a worker that ranks reach under another address of this machine, on the same port."""
    port = free_address().rpartition(":")[2]
    with FaultProxy(f"127.0.0.1:{port}", listen=f"127.0.0.2:{port}", seed=2) as proxy:
        run.add_worker(
            worker_id, options=["--address", f"127.0.0.1:{port}", "--advertise", "127.0.0.2"]
        )
        yield proxy
