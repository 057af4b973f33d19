"""`headrace run` from its data to its report; and nothing of it is left, however it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from controller.config import load_run_file
from deploy.accounting import account_for
from deploy.commands import app
from deploy.dataset import ShardOrder, open_dataset
from deploy.history import read_deliveries, trained_history
from tests.fakes_page import hear_status, is_trained
from tests.harness_runs import (
    DOMAINS,
    NUM_STEPS,
    SMALL,
    HarnessRun,
    Traces,
    assert_nothing_left,
    harness_run,
    wait_until,
    write_corpus,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

REPORT_KEYS = {
    *("run", "policy", "steps", "ranks", "workers", "tokens", "wall_s", "tokens_per_s", "domains"),
    *("max_share_error_sequences", "plan_versions", "decision_ms", "mixture_lag_steps"),
    *("data_wait_share", "probe_share", "degraded_steps", "quarantined", "lost", "duplicated"),
    *("final_mixture", "mismatched", "misordered", "plans_obeyed"),
}
"""What report.json holds at least."""

SHM = Path("/dev/shm")


def trains(run: HarnessRun, out: Path) -> bool:
    assert run.process.poll() is None, run.text()
    log = out / "received" / "received.rank0.jsonl"
    return log.exists() and log.stat().st_size > 0


def assert_all_ended(run: HarnessRun, traces: Traces, shm_before: set[str]) -> None:
    # More than the harness alone was seen, or there is nothing to conclude.
    assert len(traces.pids) > 5
    assert len(traces.sockets) > 3
    assert_nothing_left(run, traces, shm_before)


def test_a_run_ends_by_itself_with_a_complete_report_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shm_before = {path.name for path in SHM.iterdir()}
    data = write_corpus(tmp_path / "data")
    arguments = ["--data", str(data), "--out", str(out), *SMALL, "--set", "policy.batch_size=8"]
    with harness_run(arguments, log=tmp_path / "log") as run:
        wait_until(lambda: trains(run, out), timeout_s=90, what="the first step")
        traces = run.traces()
        assert run.process.wait(120) == 0, run.text()
        assert_all_ended(run, traces, shm_before)
        text = run.text()
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= REPORT_KEYS
    assert report["steps"] == NUM_STEPS
    assert report["policy"] == "acodm"
    assert report["policy_phase"] == "acting"
    assert (report["ranks"], report["workers"]) == (2, 2)
    assert (report["lost"], report["duplicated"], report["mismatched"]) == (0, 0, 0)
    assert report["max_share_error_sequences"] < 1
    assert report["plans_obeyed"]
    assert report["mixture_lag_steps"] == 2
    assert report["tokens"] > 0
    assert set(report["domains"]) == set(DOMAINS)
    for domain in report["domains"].values():
        assert domain["planned_sequences"] == domain["delivered_sequences"] > 0
    assert len((out / "digests.jsonl").read_text().splitlines()) == NUM_STEPS * 8
    for plot in ("mixture.png", "loss.png", "alignment.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert "lost 0, duplicated 0" in text
    verified = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["clean"]
    arguments = ["replay", str(out), str(tmp_path / "replayed"), "--steps", f"20:{NUM_STEPS}"]
    replayed = CliRunner().invoke(app, arguments)
    assert replayed.exit_code == 0, replayed.output
    again = (tmp_path / "replayed" / "digests.jsonl").read_text().splitlines()
    assert again == (out / "digests.jsonl").read_text().splitlines()[20 * 8 :]
    lose_a_sequence(out / "received" / "received.rank1.jsonl")
    verified = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert verified.exit_code == 4
    found = json.loads(verified.stdout)
    assert (found["clean"], found["lost"]) == (False, 1)
    assert "was never received" in found["faults"][0]


def lose_a_sequence(log: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:100] + lines[101:]))


def test_ctrl_c_in_mid_run_ends_cleanly_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shm_before = {path.name for path in SHM.iterdir()}
    data = write_corpus(tmp_path / "data")
    arguments = ["--data", str(data), "--out", str(out), *SMALL, "--steps", "100000"]
    arguments += ["--dashboard", "127.0.0.1:0"]
    with harness_run(arguments, log=tmp_path / "log") as run:
        wait_until(lambda: trains(run, out), timeout_s=90, what="the first step")
        traces = run.traces()
        page = re.search(r"live page: (\S+)", run.text())
        assert page is not None, run.text()
        status = hear_status(page[1], is_trained)
        assert (status["world_size"], status["num_workers"]) == (2, [2, 2])
        run.interrupt()
        assert run.process.wait(5) == 130, run.text()
        assert_all_ended(run, traces, shm_before)
        assert "headrace: stopped by SIGINT after" in run.text()
        assert "Traceback" not in run.text()
    report = json.loads((out / "report.json").read_text())
    assert (report["lost"], report["duplicated"], report["mismatched"]) == (0, 0, 0)
    assert report["plans_obeyed"]


def one_of(run: HarnessRun, *words: str) -> psutil.Process:
    found = [process for process in run.processes() if set(words) <= set(process.cmdline())]
    return found[0]


def test_a_worker_and_a_controller_that_die_come_back_and_a_dead_rank_ends_the_run_with_code_6(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shm_before = {path.name for path in SHM.iterdir()}
    data = write_corpus(tmp_path / "data")
    arguments = ["--data", str(data), "--out", str(out), *SMALL, "--steps", "100000"]
    with harness_run(arguments, log=tmp_path / "log") as run:

        def says(words: str) -> None:
            wait_until(lambda: words in run.text(), timeout_s=60, what=words)

        wait_until(lambda: trains(run, out), timeout_s=90, what="the first step")
        traces = run.traces()
        one_of(run, "ray::LoaderHost").kill()
        says("died; Ray starts it again")
        says("serves again")
        one_of(run, "ray::ControllerHost").kill()
        says("the controller died; Ray starts it again")
        says("the controller serves again")
        one_of(run, "deploy.examples.train", "-u").kill()
        assert run.process.wait(60) == 6, run.text()
        assert_all_ended(run, traces, shm_before)
        text = run.text()
    assert "headrace: the trainer ended with exit status" in text
    assert str(out / "trainer.log") in text
    # What Ray has to say of dead actors stays out of it, and so do tracebacks of our own.
    assert "raylet" not in text
    assert "Traceback" not in text.partition("headrace: ")[0]
    history = trained_history(read_deliveries(out / "received", DOMAINS), global_sequences=8)
    config = load_run_file(out / "run.yaml")
    assert account_for(history, ShardOrder(open_dataset(config))).clean
