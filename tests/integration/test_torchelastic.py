"""A rank is killed under torchrun: the group starts again, as large or smaller, and goes on.

The whole is long, since torchrun takes its time to notice; `make test-long` runs it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from protos.client import ControlClient
from protos.errors import StaleGeneration
from protos.types import Generation, Rank, Step, StepReport
from tests.fakes_consumer import (
    ROOT,
    ConsumedRun,
    Global,
    consumed_run,
    global_batches,
    write_corpus,
    write_run,
)
from tests.faults.checker import check
from tests.harness_runs import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(560)]

NUM_STEPS = 24
KILLED_AFTER = 7
"""Checkpoints are written after every 4 steps, so that some steps are trained again."""

GROW_STEPS = 100_000
"""More than are trained while a second node joins, however long that takes."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "LOGLEVEL": "INFO",
    # With the agent's own store (torch 2.13) both ranks of a restarted group waited for ever in
    # init_process_group, in two runs of three, before the trainer had reached Headrace.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@contextmanager
def torchrun(
    run: ConsumedRun, options: Sequence[str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the example trainer under torchrun; at the end nothing of it is left."""
    checkpoints = run.out / "checkpoints"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3", *options),
                *("deploy/examples/train.py", "--controller", run.address, "--micro-batch", "20"),
                *("--checkpoint-dir", str(checkpoints), "--checkpoint-every", "4", "--resume"),
                *("--delivery-log", str(run.out / "received")),
            ],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        for one in _family(process.pid):
            one.kill()
        process.wait(30)


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _ranks(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """Return torchrun's trainers by rank."""
    found = {}
    for one in _family(process.pid)[1:]:
        environment = one.environ()
        if "train.py" in " ".join(one.cmdline()) and "RANK" in environment:
            found[int(environment["RANK"])] = one
    return found


def _wait_for_step(run: ConsumedRun, step: int, log: Path) -> None:
    def reached() -> bool:
        return (run.out / "received").exists() and any(one.step >= step for one in run.deliveries())

    wait_until(reached, timeout_s=240, what=f"step {step}; {log.read_text()[-2000:]}")


def _newest(run: ConsumedRun, *, through: int = GROW_STEPS) -> Global:
    """Return what counts: of each step what the newest generation received of it."""
    newest: dict[int, int] = {}
    deliveries = [one for one in run.deliveries() if one.step <= through]
    for one in deliveries:
        newest[one.step] = max(newest.get(one.step, 0), one.generation)
    return global_batches([one for one in deliveries if one.generation == newest[one.step]])


@pytest.fixture
def num_steps() -> int:
    """What the run is planned for; a test may say otherwise."""
    return NUM_STEPS


@pytest.fixture
def run(tmp_path: Path, num_steps: int) -> Iterator[ConsumedRun]:
    run_file = write_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data"),
        steps=num_steps,
        data={"vocab_size": 4096},
    )
    with consumed_run(run_file) as started:
        yield started


def _elastic_options() -> tuple[list[str], list[str]]:
    """Return the options of the node that holds the rendezvous, and of one that joins it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"),
        *("--local-addr", "127.0.0.1"),
        *("--rdzv-conf", "last_call_timeout=15,keep_alive_interval=1,is_host={host}"),
    ]
    first, second = ([one.format(host=host) for one in options] for host in ("true", "false"))
    return first, second


def _restart_count(one: psutil.Process) -> int:
    return int(one.environ()["TORCHELASTIC_RESTART_COUNT"])


def _refused_reports(run: ConsumedRun, generation: int, steps: range) -> int:
    """Report steps for a generation that has ended; return how many reports were refused."""
    refused = 0
    client = ControlClient(run.address)
    try:
        for step in steps:
            sequences = np.array([7, 7, 6])
            late = StepReport(
                generation=Generation(generation),
                rank=Rank(0),
                step=Step(step),
                plan_version=1,
                sequences=sequences,
                tokens=sequences * 16,
                loss_sum=sequences * 16 * 3.0,
            )
            with pytest.raises(StaleGeneration, match=f"generation {generation}"):
                client.report(late)
            refused += 1
    finally:
        client.close()
    return refused


def _check_went_on_exactly(run: ConsumedRun, log: Path) -> None:
    trained = _newest(run)
    assert sorted(trained) == [(step, slot) for step in range(NUM_STEPS) for slot in range(20)]
    generations = {one.generation for one in run.deliveries()}
    assert len(generations) >= 2, log.read_text()
    print(log.read_text())
    for generation in sorted(generations):
        steps = {one.step for one in run.deliveries() if one.generation == generation}
        print(f"generation {generation}: steps {min(steps)} to {max(steps)}")
    # The same run on three ranks that nobody kills.
    run.consume(3, until=NUM_STEPS)
    assert _newest(run) == trained


@pytest.mark.fault_row(11, "rank SIGKILL under torchrun, the group starts again")
def test_a_killed_rank_is_started_again_with_its_group(
    run: ConsumedRun, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    log = tmp_path / "torchrun.log"
    with torchrun(run, ["--standalone", "--nproc-per-node", "2"], log) as launched:
        _wait_for_step(run, KILLED_AFTER, log)
        victim = _ranks(launched)[1]
        victim.send_signal(signal.SIGKILL)
        assert launched.wait(400) == 0, log.read_text()
    assert str(victim.pid) in log.read_text()
    _check_went_on_exactly(run, log)
    assert check(run.out) == []
    record_injections(1)


@pytest.mark.fault_row(11, "a trainer's node SIGKILL under torchrun, the other goes on alone")
def test_a_killed_node_is_gone_and_the_other_goes_on_alone(
    run: ConsumedRun, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    first, second = _elastic_options()
    log = tmp_path / "torchrun.log"
    with torchrun(run, first, log) as stays, torchrun(run, second, tmp_path / "second.log") as goes:
        _wait_for_step(run, KILLED_AFTER, log)
        for one in _family(goes.pid):
            one.kill()
        assert stays.wait(400) == 0, log.read_text()
    ranks = {one.generation: set[int]() for one in run.deliveries()}
    for path in (run.out / "received").glob("received.rank*.jsonl"):
        rank = int(path.stem.removeprefix("received.rank"))
        for generation in ranks:
            if f'"generation": {generation},' in path.read_text():
                ranks[generation].add(rank)
    assert ranks[min(ranks)] == {0, 1}
    assert ranks[max(ranks)] == {0}
    _check_went_on_exactly(run, log)
    assert check(run.out) == []
    record_injections(1)


@pytest.mark.parametrize("num_steps", [GROW_STEPS])
@pytest.mark.fault_row(12, "a node joins under torchrun, RESTART_COUNT stays")
def test_a_node_that_joins_begins_a_generation_though_no_restart_is_counted(
    run: ConsumedRun, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    first, second = _elastic_options()
    log = tmp_path / "torchrun.log"
    with torchrun(run, first, log) as stays:
        _wait_for_step(run, KILLED_AFTER, log)
        (alone,) = _ranks(stays).values()
        before, counted = run.status(), _restart_count(alone)
        assert before.world_size == 1
        with torchrun(run, second, tmp_path / "second.log"):
            wait_until(
                lambda: run.status().generation > before.generation,
                timeout_s=240,
                what=f"a generation of two nodes; {log.read_text()[-2000:]}",
            )
            joined = run.status()
            assert joined.world_size == 2
            _wait_for_step(run, joined.observed_step + 8, log)
            (stayed,) = _ranks(stays).values()
            assert stayed.pid != alone.pid
            assert _restart_count(stayed) == counted == 0
            steps = range(joined.observed_step, joined.observed_step + 8)
            refused = _refused_reports(run, before.generation, steps)
    last = min(run.status().observed_step, max(one.step for one in run.deliveries()))
    trained = _newest(run, through=last - 1)
    assert sorted(trained) == [(step, slot) for step in range(last) for slot in range(20)]
    assert len({one.generation for one in run.deliveries()}) == 2
    run.consume(3, until=last)
    assert _newest(run, through=last - 1) == trained
    assert check(run.out) == []
    record_injections(1 + refused, f"{refused} late reports of the old generation refused")


@pytest.mark.fault_row(17, "all workers SIGKILL under torchrun")
def test_torchrun_shows_what_a_rank_without_workers_died_of(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    run_file = write_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data"),
        steps=GROW_STEPS,
        data={"vocab_size": 4096},
        control={"data_timeout_s": 3.0},
    )
    log, errors = tmp_path / "torchrun.log", tmp_path / "errors"
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]
    with (
        consumed_run(run_file) as run,
        torchrun(run, [*options, "--log-dir", str(errors)], log) as launched,
    ):
        _wait_for_step(run, KILLED_AFTER, log)
        assert run.end_worker("w0", signal.SIGKILL) == -signal.SIGKILL
        assert launched.wait(120) == 1, log.read_text()
    written = [json.loads(path.read_text()) for path in errors.rglob("error.json")]
    says = [each["message"]["message"] for each in written]
    missing = [each for each in says if "within 3 s, lanes [" in each]
    assert missing, says
    assert all(each.startswith("WorkerUnreachable: step ") for each in missing)
    # Its summary of the root cause, after all that ranks have said themselves.
    assert missing[0][:60] in log.read_text().rpartition("Root Cause")[2], log.read_text()
    assert check(run.out) == []
    record_injections(1)
