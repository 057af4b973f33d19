"""Trainers that fork or spawn DataLoader workers while their session is live: nothing hangs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_trainer import FakeRun, make_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WATCHDOG_S = 60
NUM_STEPS = 8

NOT_ITS_FORK = r"this session belongs to process \d+, not to its fork \d+: use it in the training"
NO_CALLS = r"process \d+ is a fork of process \d+, which had called Headrace already, .*='spawn'\)"
NOT_SENT = "a Headrace session belongs to the process that made it and cannot be sent to another"


def _train(use: str, num_workers: int, context: str, *, persistent: bool) -> list[Any]:
    """Train in a process of its own; return what its DataLoader gave, each time it was read."""
    with FakeRun(make_spec(num_steps=NUM_STEPS)).serving() as run:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.faults.forking_trainer"),
                *(run.address, use, str(num_workers), context, str(persistent)),
            ],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=WATCHDOG_S,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == list(range(NUM_STEPS)), done.stderr[-3000:]
    assert len(found["read"]) == 2
    read: list[Any] = found["read"]
    return read


@pytest.mark.fault_row(38, "a DataLoader of the trainer's own beside a live session")
@pytest.mark.parametrize(
    ("num_workers", "context", "persistent"),
    [
        (0, "fork", False),
        (2, "fork", False),
        pytest.param(2, "fork", True, marks=pytest.mark.long),
        pytest.param(2, "spawn", False, marks=pytest.mark.long),
        pytest.param(2, "spawn", True, marks=pytest.mark.long),
    ],
)
def test_a_loader_beside_a_live_session_reads_all_and_training_goes_on(
    num_workers: int, context: str, persistent: bool, record_injections: Callable[..., None]
) -> None:
    read = _train("aside", num_workers, context, persistent=persistent)
    assert read == [list(range(100))] * 2
    record_injections(max(num_workers, 1) * (1 if persistent else 2))


@pytest.mark.long
@pytest.mark.fault_row(38, "the session, its batches or its connection used in a DataLoader worker")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    ("use", "context", "sentence"),
    [
        ("session", "fork", NOT_ITS_FORK),
        ("session", "spawn", NOT_SENT),
        ("batches", "fork", NOT_ITS_FORK),
        ("ahead", "fork", NOT_ITS_FORK),
        ("connects", "fork", NO_CALLS),
        ("client", "fork", NO_CALLS),
    ],
)
def test_what_a_worker_process_cannot_use_is_said_in_one_sentence_and_training_goes_on(
    use: str,
    context: str,
    sentence: str,
    persistent: bool,
    record_injections: Callable[..., None],
) -> None:
    first, again = _train(use, 2, context, persistent=persistent)
    assert re.search(sentence, first), first
    if persistent and use in ("batches", "ahead"):
        assert again == [], "a generator that has raised is at its end"
    else:
        # torch's own word for workers that have raised, which it does not start again.
        assert re.search(rf"{sentence}|exited unexpectedly", again), again
    record_injections(2)


@pytest.mark.long
@pytest.mark.fault_row(38, "a session of its own in each spawned DataLoader worker")
def test_a_spawned_worker_may_have_a_session_of_its_own(
    record_injections: Callable[..., None],
) -> None:
    read = _train("connects", 2, "spawn", persistent=False)
    assert read == [sorted([*range(NUM_STEPS)] * 2)] * 2
    record_injections(4)
