"""`headrace compare` from outside: killed in the middle it ends alike, and it is a run's order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.compare.compose import run_config
from deploy.compare.data import open_data
from deploy.compare.spec import CompareSpec, keep_spec, load_spec
from deploy.compare.trial import Trial
from tests.fakes_compare import SMALL_ACODM, small_spec
from tests.harness_runs import ROOT, complete, wait_until, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

POINTS = [
    {"step": 0, "mixture": "uniform"},
    {"step": 5, "mixture": {"code": 0.62, "mail": 0.05, "prose": 0.33}},
    {"step": 17, "mixture": {"mail": 0.5, "prose": 0.5}},
]


def write_spec(spec: CompareSpec, path: Path) -> Path:
    path.write_text(yaml.safe_dump(json.loads(spec.model_dump_json())))
    return path


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "compare", *arguments],
            cwd=ROOT,
            env=dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def compare(arguments: list[str], log: Path) -> None:
    process = start(arguments, log)
    assert process.wait(200) == 0, log.read_text()


def timeless(results: Any) -> Any:
    """Return results without what depends on the machine and on interruptions."""
    if isinstance(results, dict):
        left_out = ("time", "resumed")
        return {key: timeless(value) for key, value in results.items() if key not in left_out}
    return results


@pytest.mark.long
def test_a_comparison_that_was_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus")
    arms = {"uniform": {"name": "uniform"}, "acodm": SMALL_ACODM}
    spec = small_spec(source, arms, steps=200, evaluation={"every": 20, "smoothing": 2})
    shared = spec.data.model_copy(update={"prepared": tmp_path / "data"})
    file = write_spec(spec.model_copy(update={"data": shared}), tmp_path / "compare.yaml")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    compare([str(file), "--out", str(whole)], tmp_path / "whole.log")

    log = tmp_path / "broken.log"
    killed = start([str(file), "--out", str(broken)], log)
    checkpoints = broken / "trials" / "acodm.seed0" / "checkpoints"
    wait_until(
        lambda: any(checkpoints.glob("before-*")), timeout_s=120, what="the first checkpoint"
    )
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    # Nobody tells the trials: they see by themselves that nobody waits for them.
    locks = [path / "lock" for path in (broken / "trials").iterdir()]
    wait_until(lambda: all(map(is_free, locks)), timeout_s=60, what="the trials' end")
    assert not (broken / "trials" / "acodm.seed0" / "record.json").exists()
    compare([str(broken)], log)
    assert "acodm, seed 0: goes on at step" in log.read_text()

    one, other = (json.loads((each / "results.json").read_text()) for each in (whole, broken))
    assert other["arms"]["acodm"]["resumed"] == 1
    assert timeless(one) == timeless(other)
    # A finished comparison runs nothing again, and its report can be drawn anew.
    again = tmp_path / "again.log"
    records = sorted(broken.glob("trials/*/record.json"))
    before = [path.stat().st_mtime_ns for path in records]
    compare([str(broken), "--report"], again)
    assert [path.stat().st_mtime_ns for path in records] == before
    assert (broken / "report.html").stat().st_size > 10_000


def is_free(lock: Path) -> bool:
    """Say whether no process holds a trial's lock."""
    check = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", check, str(lock)], capture_output=True)
    return done.returncode == 0


@pytest.mark.long
def test_a_trial_trains_on_what_a_run_of_the_whole_system_delivers(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus")
    policy = {"name": "schedule", "points": POINTS}
    spec = small_spec(
        source, {"schedule": policy, "uniform": {"name": "uniform"}}, steps=40, seeds=[3]
    )
    out = tmp_path / "compare"
    compare(
        [str(write_spec(spec, tmp_path / "compare.yaml")), "--out", str(out), "--only", "uniform"],
        tmp_path / "compare.log",
    )
    data = open_data(spec, out)
    keep_spec(spec, out)
    received = tmp_path / "received"
    Trial(load_spec(out / "compare.yaml"), out, "schedule", 3, delivery_log=received).run()
    lines = (received / "received.rank0.jsonl").read_text().splitlines()

    settings = run_config(
        spec, data, tmp_path / "run", arm="schedule", seed=3, policy=policy
    ).model_dump(mode="json", exclude={"address", "out", "workers", "security"})
    settings["address"] = "127.0.0.1:0"
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    run = tmp_path / "run"
    complete(
        [
            *("--config", str(run_file), "--out", str(run), "--digest"),
            *("--ranks", "1", "--workers", "1"),
        ],
        log=tmp_path / "run.log",
        timeout_s=200,
    )
    delivered = [json.loads(line) for line in (run / "digests.jsonl").read_text().splitlines()]
    trained = [json.loads(line) for line in lines]
    assert len(delivered) == 40 * 8
    names = data.domains
    assert [(row["step"], row["slot"], row["domain"], row["sha256"]) for row in delivered] == [
        (row["step"], row["slot"], names[row["domain"]], row["sha256"]) for row in trained
    ]
