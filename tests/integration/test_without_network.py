"""`headrace run` where there is no network but loopback: what it needs is all there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness_runs import ROOT, write_corpus

# In namespaces of their own, so that nothing outlives the command either.
ALONE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
STEPS = 3


@pytest.mark.long
@pytest.mark.timeout(480)
def test_a_run_with_loopback_alone_trains_to_its_end(tmp_path: Path) -> None:
    try:
        subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: a network namespace cannot be made here: {error}")
    data, out = write_corpus(tmp_path / "data"), tmp_path / "out"
    arguments = ["--out", str(out), "--data", str(data), "--steps", str(STEPS)]
    arguments += ["--sequence-length", "32", "--global-sequences", "8", "--lanes", "4"]
    script = 'ip link set lo up && exec "$@"'
    command = [sys.executable, "-m", "deploy.cli", "run", *arguments]
    done = subprocess.run(
        [*ALONE, "sh", "-c", script, "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "report.json").read_text())["steps"] == STEPS
