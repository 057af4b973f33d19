"""`headrace up` on a Ray cluster of one node: brought up once, adopted, refused, brought down."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from protos.client import healthy
from tests.fakes_consumer import ConsumedRun, write_corpus, write_run
from tests.fakes_page import hear_status, is_trained
from tests.faults.processes import free_address
from tests.harness_runs import ROOT, wait_until
from tests.ray_clusters import RayCluster, ray_cluster, start_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RUN = "consumed"


def _roles(cluster: RayCluster) -> list[str]:
    """Return which of our actors' processes live on the head."""
    names = [_name(process) for process in cluster.nodes["head"].processes()]
    ours = ("NodeController", "NodeLoader", "Keeper")
    return sorted(role for name in names for role in ours if f"ray::{role}" in name)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.long
def test_workers_are_added_while_ranks_wait_and_given_back_when_they_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = write_corpus(tmp_path / "data", documents=(600, 450, 300))
    run_file = write_run(
        tmp_path / "out",
        patterns,
        steps=100_000,
        address=free_address(),
        workers={"count": 1, "min": 1, "max": 3, "grow_after_s": 2.0, "shrink_after_s": 4.0},
    )
    with ray_cluster(free_address()) as cluster:
        start_head(cluster)
        up = cluster.command("up", str(run_file), "--detach", "--json")
        assert up.returncode == 0, up.stderr
        run = ConsumedRun(tmp_path / "out", json.loads(up.stdout)["address"], drain_s=5.0)
        most, began = [1], time.monotonic()

        def after_step(step: int) -> None:
            assert time.monotonic() - began < 120, f"{run.status().wanted_workers} are wanted"
            if most[0] == 3:
                # A model that takes its time: nobody waits for data any more.
                threading.Event().wait(0.3)
            if step % 20 == 0 or most[0] == 3:
                wanted = run.status().wanted_workers
                most[0] = max(most[0], wanted)
                if wanted < most[0] == 3:
                    raise _Enough

        with pytest.raises(_Enough):
            run.consume(1, until=100_000, after_step=after_step)
        kept = cluster.command("logs", "keeper", RUN)
        assert "are wanted: ranks wait for data" in kept.stdout
        assert "2 loader workers are wanted: ranks have long not waited" in kept.stdout
        with capsys.disabled():
            print("", kept.stdout, sep="\n")
        assert cluster.command("down", RUN).returncode == 0


def _commands_of_the_guide() -> list[list[str]]:
    guide = (ROOT / "deploy/docs/ray-cluster.md").read_text()
    block = guide.partition("## The commands")[2].partition("```bash\n")[2].partition("```")[0]
    return [line.split()[1:] for line in block.splitlines()]


@pytest.mark.long
def test_the_guides_commands_and_actors_that_are_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out, write_corpus(tmp_path / "data"), address=free_address())
    said = []
    with ray_cluster(free_address()) as cluster:
        start_head(cluster)
        for command in _commands_of_the_guide():
            done = cluster.command(*command, folder=out)
            assert done.returncode == 0, (command, done.stderr)
            said.append(done.stdout)
            if command[0] == "scale":
                _kill_keeper_and_controller(cluster, out)
    assert len(said) == 8
    assert "is up: controller at" in said[0]
    assert "is up already: controller at" in said[1]
    assert "loader workers 2 -> 3" in said[3]
    assert "serves run" in said[4]
    assert "3 loader workers have ended" in said[6], "a new keeper took up what was there"
    assert said[7] == f"run {RUN!r} was not up\n"


def _kill_keeper_and_controller(cluster: RayCluster, out: Path) -> None:
    before = _pids(cluster)
    for role in ("Keeper", "NodeController"):
        psutil.Process(before[role]).kill()
    wait_until(
        lambda: (
            {"Keeper", "NodeController"} <= _pids(cluster).keys()
            and not {*_pids(cluster).values()} & {before["Keeper"], before["NodeController"]}
        ),
        timeout_s=90,
        what="a new keeper and a new controller",
    )
    address = (out / "controller.address").read_text().strip()
    wait_until(lambda: healthy(address, timeout_s=1), timeout_s=90, what="the controller to serve")
    wait_until(
        lambda: sum(w.alive for w in ConsumedRun(out, address, drain_s=5.0).status().workers) == 3,
        timeout_s=60,
        what="all workers at the new controller",
    )


def _pids(cluster: RayCluster) -> dict[str, int]:
    found = {}
    for process in cluster.nodes["head"].processes():
        for role in ("Keeper", "NodeController"):
            if f"ray::{role}" in _name(process):
                found[role] = process.pid
    return found


class _Enough(Exception):
    """All that was to be seen has been seen."""


def test_a_run_is_brought_up_once_adopted_refused_if_it_differs_and_brought_down_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data"),
        address=free_address(),
        dashboard={"address": free_address()},
    )
    other = tmp_path / "other.yaml"
    document = yaml.safe_load(run_file.read_text())
    document["seed"], document["batch"]["window_samples"] = 12, 16
    other.write_text(yaml.safe_dump(document))
    with ray_cluster(free_address()) as cluster:
        start_head(cluster)
        started = time.monotonic()
        up = cluster.command("up", str(run_file), "--detach", "--json")
        assert up.returncode == 0, up.stderr
        found = json.loads(up.stdout)
        assert (found["run"], found["address"], found["adopted"]) == (
            RUN, document["address"], False,
        )  # fmt: skip
        run = ConsumedRun(tmp_path / "out", found["address"], drain_s=5.0)
        first: list[float] = []
        seen: list[dict[str, Any]] = []

        def after_step(step: int) -> None:
            if not first:
                first.append(time.monotonic() - started)
            if step == 9:
                seen.append(hear_status(found["page"], is_trained))

        run.consume(1, until=10, after_step=after_step)
        with capsys.disabled():
            print(f"\nheadrace up to the end of the first step: {first[0]:.1f} s")
        assert _roles(cluster) == ["Keeper", "NodeController", "NodeLoader", "NodeLoader"]
        assert found["page"] == f"http://{document['dashboard']['address']}/"
        assert [each["num_workers"] for each in seen] == [[2, 2]]
        assert "token" not in up.stderr

        again = cluster.command("up", str(run_file), "--detach")
        assert again.returncode == 0, again.stderr
        assert f"run {RUN!r} is up already: controller at {found['address']}" in again.stdout
        assert f"live page: {found['page']}" in again.stdout
        differs = cluster.command("up", str(other), "--detach")
        assert differs.returncode == 2
        for said in (
            "seed: 12 in the file, 11 running",
            "batch.window_samples: 16 in the file, 8 running",
        ):
            assert said in differs.stderr
        assert run.status().observed_step == 9, "it was left alone"

        down = cluster.command("down", RUN)
        assert down.returncode == 0, down.stderr
        assert down.stdout.endswith(f"run {RUN!r} is down\n")
        assert _roles(cluster) == []
        assert not (tmp_path / "out" / "controller.address").exists()
        gone = cluster.command("down", str(run_file))
        assert (gone.returncode, gone.stdout) == (0, f"run {RUN!r} was not up\n"), gone.stderr
