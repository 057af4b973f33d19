"""Told to stop at any moment, commands end within seconds, leave nothing, and lose nothing."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from controller.ledger import reading_ledger, verify
from deploy.record import LEDGER
from deploy.report import DIGESTS, REPORT
from deploy.runfile import RUN_FILE
from tests.fakes_compare import small_spec
from tests.fakes_consumer import write_corpus as write_shards
from tests.fakes_consumer import write_run
from tests.fakes_controller import run_document
from tests.faults.processes import free_address
from tests.harness_runs import (
    DOMAINS,
    SCHEDULE,
    SMALL,
    HarnessRun,
    assert_nothing_left,
    complete,
    harness_run,
    wait_until,
    write_corpus,
)
from tests.ray_clusters import ray_cluster, start_head

pytestmark = [pytest.mark.slow, pytest.mark.long]

WITHIN_S = 5.0
NUM_STOPS = 50
STOPS_A_RUN = 7
SHM = Path("/dev/shm")


def tell_to_stop(run: HarnessRun, draw: random.Random) -> tuple[float, int]:
    """Press Ctrl-C or send SIGTERM, half the time twice; return how long it took and the status.

    Raises:
        subprocess.TimeoutExpired: it did not end within 5 s.
    """
    told_s = time.monotonic()
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    for times in range(draw.choice([1, 2])):
        if times:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(draw.uniform(0, 1))
        if run.process.poll() is None:
            run.interrupt() if number == signal.SIGINT else run.process.send_signal(number)
    status = run.process.wait(told_s + WITHIN_S - time.monotonic())
    return time.monotonic() - told_s, status


def stop_a_run(
    arguments: list[str], log: Path, draw: random.Random, *, moment_s: float
) -> tuple[str, float] | None:
    """Start a run and stop it after a while; return where it was and how long it took to end.

    None: it had ended by itself.
    """
    shm_before = {path.name for path in SHM.iterdir()}
    with harness_run(arguments, log=log) as run:
        try:
            assert run.process.wait(moment_s) == 0, run.text()
        except subprocess.TimeoutExpired:
            pass
        else:
            return None
        traces = run.traces()
        told = run.text()
        if run.process.poll() is not None:
            return None
        took_s, status = tell_to_stop(run, draw)
        # Before it has taken the signals, while Python starts, they end it as they end any.
        assert status in (0, 130, -signal.SIGINT, -signal.SIGTERM), (status, run.text())
        assert status != 130 or "Traceback" not in run.text(), run.text()
        assert_nothing_left(run, traces, shm_before)
    phase = "before training"
    if "starting Ray, controller and workers: " in told:
        phase = "in training"
    if "checking what the trainers received: " in told:
        phase = "while it reported"
    return phase, took_s


def assert_whole(out: Path) -> None:
    """Expect that what a stopped run has written can be read."""
    for name in (REPORT, "training.json"):
        if (out / name).exists():
            json.loads((out / name).read_text())
    for plot in out.glob("[a-z]*.png"):
        assert plot.read_bytes().endswith(b"IEND\xaeB`\x82")
    if (out / LEDGER).exists() and (out / LEDGER).stat().st_size:
        with reading_ledger(out / LEDGER) as database:
            verify(database, out / LEDGER)


@pytest.mark.fault_row(37, "Ctrl-C or SIGTERM, once or twice, to `headrace run` at 50 moments")
@pytest.mark.timeout(3600)
def test_a_run_told_to_stop_at_50_moments_ends_within_5_s_and_goes_on_to_the_same_end(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    draw = random.Random(NUM_STOPS)
    data = write_corpus(tmp_path / "data")
    fresh = ["--data", str(data), "--policy", "schedule", "--set", SCHEDULE, *SMALL]
    shared = ["--checkpoint-every", "10", "--digest"]
    began_s = time.monotonic()
    complete(["--out", str(tmp_path / "whole"), *fresh, *shared], log=tmp_path / "whole.log")
    whole_s = time.monotonic() - began_s
    digests = (tmp_path / "whole" / DIGESTS).read_bytes()

    # Spread evenly over what a run takes, from Python's start to the plots.
    moments = [whole_s * (number + draw.random()) / NUM_STOPS for number in range(NUM_STOPS)]
    draw.shuffle(moments)
    took: list[float] = []
    phases: Counter[str] = Counter()
    num_runs = 0
    while moments:
        num_runs += 1
        out = tmp_path / f"run-{num_runs}"
        for start in range(min(STOPS_A_RUN, len(moments))):
            begun = (out / RUN_FILE).exists()
            arguments = ["--out", str(out), *(["--resume"] if begun else fresh), *shared]
            log = tmp_path / f"run-{num_runs}.{start}.log"
            moment_s = moments.pop()
            found = stop_a_run(arguments, log, draw, moment_s=moment_s)
            assert_whole(out)
            if found is None:
                # The rest of a resumed run takes less than all of it: another is to be stopped.
                moments.append(0.9 * moment_s)
                break
            phases[found[0]] += 1
            took.append(found[1])
        rest = ["--resume"] if (out / RUN_FILE).exists() else fresh
        complete(["--out", str(out), *rest, *shared], log=tmp_path / f"run-{num_runs}.last.log")
        assert (out / DIGESTS).read_bytes() == digests
        report = json.loads((out / REPORT).read_text())
        assert (report["lost"], report["duplicated"], report["mismatched"]) == (0, 0, 0)
    took.sort()
    assert len(took) >= NUM_STOPS
    assert set(phases) >= {"before training", "in training"}
    where = ", ".join(f"{number} {phase}" for phase, number in sorted(phases.items()))
    record_injections(
        len(took),
        f"ended after {took[len(took) // 2]:.2f} s (median), {took[-1]:.2f} s at most; {where}",
    )


def stop_when(run: HarnessRun, is_time: Callable[[], bool], *, what: str) -> float:
    """Press Ctrl-C at a moment that can be seen; return how long the command took to end."""
    shm_before = {path.name for path in SHM.iterdir()}

    def is_there() -> bool:
        assert run.process.poll() is None, run.text()
        return is_time()

    wait_until(is_there, timeout_s=120, what=what)
    traces = run.traces()
    told_s = time.monotonic()
    run.interrupt()
    assert run.process.wait(WITHIN_S) == 130, run.text()
    took_s = time.monotonic() - told_s
    assert "Traceback" not in run.text(), run.text()
    assert_nothing_left(run, traces, shm_before)
    return took_s


@pytest.mark.fault_row(
    37, "Ctrl-C to `headrace pack` and `headrace index`, which work in processes"
)
@pytest.mark.timeout(300)
def test_packing_and_indexing_that_are_stopped_leave_no_process_and_no_half_folder(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    data = write_corpus(tmp_path / "data", documents=700)
    out = tmp_path / "shards"
    arguments = [str(data), str(out), "--shard-mb", "0.02", "--processes", "2"]
    with harness_run(arguments, command="pack", log=tmp_path / "pack.log") as run:
        half = tmp_path / "shards.partial"
        took = [stop_when(run, lambda: any(half.glob("*/*.tar")), what="the first shard")]
        assert not half.exists()
        assert not out.exists()
    with harness_run(arguments, command="pack", log=tmp_path / "whole.log") as run:
        assert run.process.wait(120) == 0, run.text()

    document = run_document(tmp_path / "run")
    document["data"] = {
        "index": str(tmp_path / "index.parquet"),
        "vocab_size": 64,
        "eot_id": 0,
        "domains": {name: {"shards": [str(out / name / "*.tar")]} for name in DOMAINS},
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(document))
    arguments = [str(run_file), "--processes", "2"]
    begun = tmp_path / "index.partial.jsonl"
    with harness_run(arguments, command="index", log=tmp_path / "index.log") as run:
        took.append(stop_when(run, begun.exists, what="the first shard's line"))
        assert not (tmp_path / "index.parquet").exists()
    with harness_run(arguments, command="index", log=tmp_path / "again.log") as run:
        assert run.process.wait(120) == 0, run.text()
    assert not begun.exists()
    record_injections(2, f"ended after {took[0]:.2f} s and {took[1]:.2f} s")


@pytest.mark.fault_row(37, "Ctrl-C to `headrace compare` while it trains")
@pytest.mark.timeout(300)
def test_a_comparison_that_is_stopped_leaves_no_process_and_goes_on(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    spec = small_spec(write_corpus(tmp_path / "data"), {"u": {"name": "uniform"}}, steps=60)
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(json.loads(spec.model_dump_json())))
    out = tmp_path / "out"
    arguments = [str(file), "--out", str(out), "--jobs", "2"]
    with harness_run(arguments, command="compare", log=tmp_path / "log") as run:
        took_s = stop_when(
            run, lambda: any(out.rglob("progress.json")), what="a trial that has begun"
        )
        assert "the same command goes on" in run.text()
    with harness_run(arguments, command="compare", log=tmp_path / "again.log") as run:
        assert run.process.wait(200) == 0, run.text()
    record_injections(1, f"ended after {took_s:.2f} s")


@pytest.mark.fault_row(37, "Ctrl-C to `headrace up` while it serves")
@pytest.mark.timeout(300)
def test_a_run_on_a_cluster_is_taken_down_within_5_s(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    run_file = write_run(tmp_path / "out", write_shards(tmp_path / "data"), address=free_address())
    with ray_cluster(free_address()) as cluster:
        head = start_head(cluster)
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
        with harness_run(
            [str(run_file)], command="up", log=tmp_path / "log", environment=environment
        ) as run:
            took_s = stop_when(run, lambda: "is up" in run.text(), what="a run that is up")
        shown = [" ".join(process.cmdline()) for process in head.processes()]
        assert not [each for each in shown if "Keeper" in each or "NodeLoader" in each]
        down = cluster.command("down", "consumed")
        assert down.stdout == "run 'consumed' was not up\n", down.stdout
    record_injections(1, f"ended after {took_s:.2f} s")
