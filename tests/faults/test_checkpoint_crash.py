"""A trainer killed while it saves: model and place in the data are of one step, always."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes_consumer import ROOT

NUM_KILLS = 8


@pytest.mark.slow
@pytest.mark.fault_row(14, "trainer SIGKILL while it saves model and place in the data")
@pytest.mark.timeout(120)
def test_a_kill_while_saving_never_pairs_a_model_with_another_steps_data(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    command = [sys.executable, "-m", "tests.faults.saver", str(tmp_path), str(NUM_KILLS)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    kills, unfinished, step = map(int, done.stdout.split())
    # Some kills hit in the middle of a checkpoint, and some steps were saved.
    assert kills == NUM_KILLS
    assert unfinished > 0
    assert step > 0
    record_injections(kills, f"{unfinished} in the middle of a checkpoint")
