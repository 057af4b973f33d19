"""All loader workers dead: each rank says in time what is missing, and nothing hangs."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_consumer import write_corpus
from tests.faults.checker import check, read_events
from tests.faults.processes import PLENTY_S, fault_run, write_fault_run

pytestmark = pytest.mark.slow

DATA_TIMEOUT_S = 3.0
SLACK_S = 20.0
"""For what comes beside the wait itself: noticing, saying so, closing, on a busy machine."""

SAYS = re.compile(
    r"step \d+ did not come to rank (?P<rank>\d) within 3 s, lanes \[\d.*\] are missing; "
    r"lanes \[\d.*\]: no answer from 127\.0\.0\.1:\d+.*"
    r"; the controller says: no loader worker serves all lanes now"
)


@pytest.mark.fault_row(17, "all workers SIGKILL")
@pytest.mark.timeout(180)
def test_when_all_workers_are_dead_each_rank_ends_in_time_and_says_what_is_missing(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    settings: dict[str, Any] = {
        "steps": 100_000,
        "policy": {"name": "odm", "warmup_steps": 10},
        "control": {"data_timeout_s": DATA_TIMEOUT_S},
    }
    run_file = write_fault_run(
        tmp_path / "run", write_corpus(tmp_path / "data", documents=(400, 300, 200)), **settings
    )
    with fault_run(run_file) as run:
        run.start_ranks(2, until=100_000, step_s=0.05)
        run.wait_observed(5)
        for worker in run.workers.values():
            assert worker.end(signal.SIGKILL) == -signal.SIGKILL
        dead_s = time.monotonic()
        for rank in run.ranks:
            assert rank.process.wait(PLENTY_S) == 1
        failed = [event for event in read_events(run.out) if event["event"] == "failed"]
        assert [worker.alive for worker in run.status().workers] == [False, False]
    assert {event["error"] for event in failed} == {"WorkerUnreachable"}
    says = [SAYS.match(event["says"]) for event in failed]
    assert None not in says, failed
    assert sorted(said["rank"] for said in says if said is not None) == ["0", "1"]
    longest_s = max(event["time_s"] for event in failed) - dead_s
    assert longest_s < DATA_TIMEOUT_S + SLACK_S
    assert check(run.out) == []
    record_injections(2, f"ranks ended after {longest_s:.1f} s of {DATA_TIMEOUT_S:g} s")
