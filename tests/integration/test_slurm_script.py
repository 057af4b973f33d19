"""deploy/slurm/headrace.sbatch to a run's end, with stand-ins for Slurm's own programs.

Two nodes are two addresses of this machine. All that the script starts is real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind
from deploy.commands import app
from tests.fakes_consumer import write_corpus, write_run
from tests.faults.processes import free_address
from tests.harness_runs import MARK, ROOT, marked_processes

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]

NODES = ("127.0.0.1", "127.0.0.2")
SCRIPT = ROOT / "deploy/slurm/headrace.sbatch"
NUM_STEPS, FIRST_STEPS = 24, 10
_JOB_S = 170

SCONTROL = """#!/usr/bin/env bash
# `scontrol show hostnames PREFIX[A-B]`: a name a line.
[ "$1 $2" = "show hostnames" ] || exit 2
bounds=${3#*[} bounds=${bounds%]}
for number in $(seq "${bounds%-*}" "${bounds#*-}"); do echo "${3%%[*}$number"; done
"""

SRUN = """#!/usr/bin/env bash
# Start a step's command once for each of its nodes, and hand TERM on to all of them.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
while [[ $1 == -* ]]; do
  case $1 in
    --nodelist=*) nodes=${1#*=} ;;
    --overlap | --nodes=1 | --ntasks=1 | --ntasks-per-node=1 | --kill-on-bad-exit=0) ;;
    *) echo "srun: unrecognized option '$1'" >&2; exit 2 ;;
  esac
  shift
done
tasks=() status=0
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
for node in $nodes; do
  number=${#tasks[@]}
  SLURMD_NODENAME=$node SLURM_NODEID=$number SLURM_PROCID=$number SLURM_LOCALID=0 "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do
  until wait "$task"; code=$?; ! kill -0 "$task" 2>/dev/null; do :; done
  ((code > status)) && status=$code
done
exit $status
"""


def _write_programs(folder: Path) -> None:
    folder.mkdir()
    ours = f'#!/bin/sh\nexec "{sys.executable}" -m deploy.cli "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("headrace", ours)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


class _Jobs:
    """Jobs of one run in one folder."""

    def __init__(self, folder: Path, port: str) -> None:
        self._folder = folder
        self._mark = uuid.uuid4().hex
        path = os.pathsep.join(
            [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        self._environment = {
            **os.environ,
            MARK: self._mark,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HEADRACE_PORT": port,
            "HEADRACE_RDZV_PORT": free_address().rpartition(":")[2],
            "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
            "SLURM_JOB_NUM_NODES": str(len(NODES)),
        }

    def run(self, job_id: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the script as a job, to its end."""
        job = {"SLURM_JOB_ID": str(job_id), "SLURM_TMPDIR": str(self._folder / f"disk-{job_id}")}
        train = ["run/run.yaml", str(ROOT / "deploy/examples/train.py"), *arguments]
        train += ["--checkpoint-dir", "checkpoints", "--delivery-log", "run/received"]
        return subprocess.run(
            ["bash", str(SCRIPT), *train],
            cwd=self._folder,
            env={**self._environment, **job},
            capture_output=True,
            text=True,
            timeout=_JOB_S,
            check=False,
        )

    def left(self) -> list[psutil.Process]:
        """Return the processes that live on."""
        return marked_processes(self._mark)

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self.left():
            process.kill()


@pytest.fixture(name="jobs")
def _jobs(tmp_path: Path) -> Iterator[_Jobs]:
    """A run as the guide has it: any address, guarded by the files of deploy/secrets.sh."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on this machine, which makes the certificates")
    secrets = tmp_path / "secrets"
    subprocess.run(["bash", str(ROOT / "deploy/secrets.sh"), str(secrets)], check=True)
    port = free_address().rpartition(":")[2]
    write_run(
        tmp_path / "run",
        write_corpus(tmp_path / "data"),
        steps=NUM_STEPS,
        address=f"0.0.0.0:{port}",
        security={
            "tls": {
                "cert": str(secrets / "headrace.pem"),
                "key": str(secrets / "headrace.key"),
                "server_name": "headrace",
            },
            "join_token_file": str(secrets / "join"),
            "admin_token_file": str(secrets / "admin"),
        },
    )
    _write_programs(tmp_path / "bin")
    jobs = _Jobs(tmp_path, port)
    yield jobs
    jobs.end()


def test_a_job_trains_on_two_nodes_and_the_next_one_goes_on_to_the_end(
    tmp_path: Path, jobs: _Jobs
) -> None:
    first = jobs.run(1, "--until", str(FIRST_STEPS))
    assert first.returncode == 0, first.stderr
    assert jobs.left() == []
    again = jobs.run(2, "--resume")
    assert again.returncode == 0, again.stderr
    assert jobs.left() == []
    with reading_ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        steps = [row.step for row in read_rows(ledger, Kind.STEP)]
        events = [row.body for row in read_rows(ledger, Kind.EVENT)]
        ranks = [row.body["world_size"] for row in read_rows(ledger, Kind.GENERATION)]
    assert steps == list(range(NUM_STEPS))
    assert ranks == [2, 2]
    served = [each["endpoint"] for each in events if each["event"] == "worker enlisted"]
    assert sorted(endpoint.rpartition(":")[0] for endpoint in served) == sorted(2 * NODES)
    for job_id in (1, 2):
        assert any((tmp_path / f"disk-{job_id}").rglob("*")), "the cache is on the node's disk"
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "run"), "--json"])
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["clean"]


def test_a_job_whose_training_fails_ends_with_its_status_and_leaves_nothing(jobs: _Jobs) -> None:
    failed = jobs.run(1, "--no-such-option")
    assert failed.returncode != 0
    assert "unrecognized arguments: --no-such-option" in failed.stderr
    assert jobs.left() == []
