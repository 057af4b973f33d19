"""JSON logs of loader workers and of a trainer: every line parses and says where it comes from."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_consumer import ROOT, WorkerProcess, consumed_run, write_corpus, write_run
from tests.harness_runs import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(240)]

RUN = "consumed"
NUM_STEPS, PAUSE_AT = 60, 5
_END_S = 60.0

TRAINER = """
import logging, sys
import trainer_client
from protos.log_format import JsonFormatter

handler = logging.StreamHandler()
handler.setFormatter(JsonFormatter())
logging.basicConfig(level=logging.INFO, handlers=[handler])
address, pause_at = sys.argv[1], int(sys.argv[2])
with trainer_client.connect(address, rank=0, world_size=1, timeout_s=60) as session:
    for batch in session.batches(micro_batch=4):
        if batch.last_of_step:
            session.end_step()
            if batch.step == pause_at:
                print("paused", flush=True)
                sys.stdin.readline()
"""


def _lines(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    return found


def test_every_line_of_workers_and_of_a_trainer_parses_and_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = write_run(tmp_path / "out", write_corpus(tmp_path / "data"), steps=NUM_STEPS)
    with consumed_run(run_file, num_workers=0) as run:
        for worker_id, options in (("w0", ["--log-format", "json"]), ("w1", [])):
            monkeypatch.setenv("HEADRACE_LOG_FORMAT", "text" if options else "json")
            run.workers[worker_id] = WorkerProcess(
                run.address,
                worker_id,
                cache=tmp_path / "cache",
                log=tmp_path / f"{worker_id}.log",
                options=["--verbose", *options],
            )
        wait_until(lambda: len(run.alive()) == 2, timeout_s=_END_S, what="two workers")
        with subprocess.Popen(
            [sys.executable, "-c", TRAINER, run.address, str(PAUSE_AT)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == "paused\n"
            run.end_worker("w0", signal.SIGKILL)
            _, told = trainer.communicate("go on\n", timeout=_END_S)
        assert trainer.returncode == 0, told
        assert run.end_worker("w1", signal.SIGTERM) == 0

    trained = _lines(told)
    assert {(line["run"], line["rank"]) for line in trained} == {(RUN, 0)}
    without = [line for line in trained if "ended without losses" in line["message"]]
    assert [line["step"] for line in without] == [0]
    broken = [line for line in trained if line["message"].startswith("stream of lanes")]
    assert broken
    assert all(line["step"] > PAUSE_AT and line["level"] == "warning" for line in broken)
    for worker_id in ("w0", "w1"):
        said = _lines((tmp_path / f"{worker_id}.log").read_text())
        served = [line for line in said if line["message"].startswith(f"worker {worker_id} serves")]
        assert [(line["run"], line["worker"]) for line in served] == [(RUN, worker_id)]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_a_worker_ends_with_is_a_line_of_its_log_too(tmp_path: Path, as_json: bool) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loader_workers", "--controller", "127.0.0.1:7700"),
            *("--address", "0.0.0.0:0", "--log-format", "json" if as_json else "text"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_END_S,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    said = _lines(done.stderr)[-1]["message"] if as_json else last.removeprefix("loader worker: ")
    assert said.startswith("binding 0.0.0.0:0"), done.stderr
    assert (last[0] == "{") is as_json
