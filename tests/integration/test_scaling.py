"""Loader workers added and taken away while a run trains: lanes move, batches do not change."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from deploy.report import checks, examine
from protos.client import AdminClient
from protos.status import RunStatus, WorkerStatus
from tests.fakes_consumer import ConsumedRun, Global, consumed_run, global_batches, write_run
from tests.fakes_consumer import write_corpus as write_token_corpus
from tests.harness_runs import ROOT, SMALL, HarnessRun, harness_run, wait_until, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAULTS = ("lost", "duplicated", "mismatched", "misordered")
NUM_STEPS = 900
BETWEEN = 260
"""Steps from one change to the next: more than a hand-over looks ahead."""

COMPUTE_S = 0.02
"""What stands for the trainer's work on a step; without any, ranks would wait for data always."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Global]:
    """The shards, and the batches of a run on them by one rank and one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    patterns = write_token_corpus(folder / "data", documents=(600, 450, 300))
    with consumed_run(write_run(folder / "out", patterns, steps=NUM_STEPS)) as run:
        run.consume(1, until=NUM_STEPS)
        return patterns, global_batches(run.deliveries())


def _lanes(run: ConsumedRun) -> dict[str, int]:
    return {each.worker_id: len(each.lanes) for each in run.status().workers if each.alive}


def _even(run: ConsumedRun, *worker_ids: str) -> bool:
    lanes = _lanes(run)
    return lanes.keys() == set(worker_ids) and max(lanes.values()) - min(lanes.values()) <= 1


def _wait_even(run: ConsumedRun, *worker_ids: str) -> None:
    wait_until(lambda: _even(run, *worker_ids), timeout_s=60, what=f"lanes spread on {worker_ids}")


def test_1_3_2_workers_while_training_change_no_batch_and_break_no_stream(
    tmp_path: Path,
    undisturbed: tuple[dict[str, str], Global],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    patterns, expected = undisturbed
    out = tmp_path / "out"
    caplog.set_level(logging.INFO, logger="trainer_client")
    caplog.clear()
    waits: list[float] = []
    with consumed_run(write_run(out, patterns, steps=NUM_STEPS)) as run:
        seen: dict[int, set[str]] = {}

        def change(step: int) -> None:
            # Ranks stand still meanwhile, with steps prefetched and streams open.
            waits.append(sum(session.data_wait_s for session in run.sessions))
            threading.Event().wait(COMPUTE_S)
            if step == BETWEEN:
                seen[1] = run.streaming()
                run.add_worker("w1")
                run.add_worker("w2")
                _wait_even(run, "w0", "w1", "w2")
                assert run.streaming() == seen[1], "nothing moves before ranks hear of it"
            if step == 2 * BETWEEN:
                seen[3] = run.streaming()
                run.workers["w0"].process.send_signal(signal.SIGTERM)
                wait_until(lambda: _lanes(run)["w0"] == 0, timeout_s=60, what="w0 to give up")
            if step == 3 * BETWEEN:
                # It has handed over and gone, long before it would have been cut off.
                assert run.workers.pop("w0").process.wait(20) == 0
                seen[2] = run.streaming()

        run.consume(3, until=NUM_STEPS, after_step=change)
        moved = run.status().lanes_moved
    assert [len(seen[count]) for count in (1, 3, 2)] == [1, 3, 2]
    assert seen[2] < seen[3]
    # Of 5 lanes 3 went to the new ones; w0 had 2 or 1 left to give.
    assert 4 <= moved <= 5
    assert [record.getMessage() for record in caplog.records if "broke" in record.message] == []
    assert global_batches(run.deliveries()) == expected
    findings = examine(out)
    assert {name: checks(findings)[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert findings.clean
    calm = waits[BETWEEN - 2] - waits[2]
    extra = [waits[at + BETWEEN - 2] - waits[at + 2] - calm for at in (BETWEEN, 2 * BETWEEN)]
    with capsys.disabled():
        print(
            f"\n3 ranks waited {calm:.3f} s for the data of {BETWEEN - 4} calm steps, and "
            f"{extra[0]:+.3f} s and {extra[1]:+.3f} s beside that with a hand-over among them"
        )
    # On a busy machine ranks wait for the processor, too: as much as in calm steps, and then some.
    assert max(extra) < 1.0 + calm, "a hand-over costs next to nothing"


def test_a_worker_killed_while_it_hands_over_costs_a_pause_and_nothing_else(
    tmp_path: Path, undisturbed: tuple[dict[str, str], Global]
) -> None:
    patterns, expected = undisturbed
    out = tmp_path / "out"
    with consumed_run(write_run(out, patterns, steps=NUM_STEPS), num_workers=3) as run:
        killed: list[int] = []

        def change(step: int) -> None:
            if step == BETWEEN:
                _wait_even(run, "w0", "w1", "w2")
            if step == 2 * BETWEEN:
                run.workers["w1"].process.send_signal(signal.SIGTERM)
                wait_until(lambda: _lanes(run)["w1"] == 0, timeout_s=60, what="w1 to give up")
            if step == 2 * BETWEEN + 20:
                # Ranks have heard, and still get the steps in between from it.
                endpoint = run.alive()["w1"]
                assert endpoint in run.streaming()
                killed.append(run.end_worker("w1", signal.SIGKILL))

        run.consume(3, until=NUM_STEPS, after_step=change)
        assert killed == [-signal.SIGKILL]
        assert set(_lanes(run)) == {"w0", "w2"}
        assert global_batches(run.deliveries()) == expected
    assert examine(out).clean


def _scale(wanted: int, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "scale", str(wanted), str(out), *more],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def _status(out: Path) -> RunStatus:
    admin = AdminClient((out / "controller.address").read_text().strip())
    try:
        return admin.status(timeout_s=30)
    finally:
        admin.close()


def _process_at(run: HarnessRun, worker: WorkerStatus) -> psutil.Process:
    port = int(worker.endpoint.rpartition(":")[2])
    for process in run.processes():
        if any(c.laddr and c.laddr.port == port for c in process.net_connections("tcp")):
            return process
    raise AssertionError(f"no process serves port {port}")


def _steps_go_on(out: Path, num_steps: int) -> None:
    before = _status(out).observed_step
    wait_until(
        lambda: _status(out).observed_step >= before + num_steps,
        timeout_s=60,
        what=f"{num_steps} more steps after step {before}",
    )


@pytest.mark.long
def test_a_live_run_of_headrace_is_scaled_from_another_shell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = write_corpus(tmp_path / "data")
    arguments = ["--data", str(data), "--out", str(out), *SMALL, "--steps", "100000"]
    with harness_run([*arguments, "--workers", "1"], log=tmp_path / "log") as run:
        wait_until(
            lambda: (out / "controller.address").exists() and _status(out).observed_step >= 3,
            timeout_s=90,
            what="the first steps",
        )
        more = _scale(3, out)
        assert more.returncode == 0, more.stderr + run.text()
        assert "loader workers 1 -> 3" in more.stdout
        _steps_go_on(out, 20)
        fewer = _scale(2, out, "--json")
        assert fewer.returncode == 0, fewer.stderr + run.text()
        result = json.loads(fewer.stdout)
        assert (result["workers_before"], result["workers_after"]) == (3, 2)
        assert sorted(result["lanes"].values()) == [2, 2]
        assert result["lanes_moved"] >= 1
        _steps_go_on(out, 20)
        # One is killed while it hands over: it is not started again, and nothing is lost.
        victim = next(each for each in _status(out).workers if each.worker_id == "worker-1")
        process = _process_at(run, victim)
        down = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "scale", "1", str(out)], cwd=ROOT
        )
        wait_until(
            lambda: any(each.leaving and each.alive for each in _status(out).workers),
            timeout_s=60,
            what="a worker that is leaving",
        )
        process.kill()
        assert down.wait(120) == 0, run.text()
        _steps_go_on(out, 20)
        assert [each.worker_id for each in _status(out).workers if each.alive] == ["worker-0"]
        assert _status(out).wanted_workers == 1
        nonsense = _scale(0, out)
        assert nonsense.returncode == 2
        run.interrupt()
        assert run.process.wait(90) == 130, run.text()
        text = run.text()
    assert "loader workers: 1 -> 3" in text
    assert "the loader worker-2 has left" in text
    assert "Traceback" not in text
    report = json.loads((out / "report.json").read_text())
    assert {name: report[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert report["steps"] > 60
    assert not (out / "controller.address").exists()
    gone = _scale(2, out)
    assert gone.returncode == 2
    assert "no controller serves the run" in gone.stderr


def test_the_last_worker_serves_on_until_a_second_signal_or_another_worker(tmp_path: Path) -> None:
    patterns = write_token_corpus(tmp_path / "data")
    run_file = write_run(tmp_path / "out", patterns)
    with consumed_run(run_file) as run:

        def change(step: int) -> None:
            if step == 10:
                first = run.workers.pop("w0").process
                first.send_signal(signal.SIGTERM)
                wait_until(
                    lambda: any(each.leaving for each in run.status().workers),
                    timeout_s=60,
                    what="a worker that is leaving",
                )
                assert _lanes(run) == {"w0": 5}, "nobody else can take its lanes"
                assert first.poll() is None
                first.send_signal(signal.SIGINT)
                assert first.wait(10) == 0
                run.add_worker("w1")

        run.consume(2, until=40, after_step=change)
        assert _lanes(run) == {"w1": 5}
    assert examine(tmp_path / "out").clean
