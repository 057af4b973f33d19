"""`headrace up` in the foreground and `headrace logs --follow`, on real Ray clusters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes_consumer import ConsumedRun, write_corpus, write_run
from tests.fakes_page import hear_status, is_trained
from tests.faults.processes import free_address
from tests.harness_runs import ROOT, wait_until
from tests.ray_clusters import RayCluster, ray_cluster, start_head

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

RUN = "consumed"
_END_S = 60.0
ROLES = ("NodeController", "NodeLoader", "Keeper")


class Foreground:
    """A command that stays, as somebody at a terminal sees it."""

    def __init__(self, cluster: RayCluster, log: Path, *arguments: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", *arguments],
                cwd=ROOT,
                env={**cluster.environment, "RAY_ADDRESS": cluster.address},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """Return what it has said so far."""
        return self._log.read_text()

    def says(self, words: str) -> None:
        """Wait until it has said something."""

        def has_said() -> bool:
            assert self.process.poll() is None or words in self.text(), self.text()
            return words in self.text()

        wait_until(has_said, timeout_s=_END_S, what=words)

    def press_ctrl_c(self) -> int:
        """Interrupt it; return its exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(_END_S)


@contextmanager
def foreground(cluster: RayCluster, log: Path, *arguments: str) -> Iterator[Foreground]:
    command = Foreground(cluster, log, *arguments)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait(_END_S)


def _roles(cluster: RayCluster, node: str) -> list[str]:
    lines = [" ".join(process.cmdline()) for process in cluster.nodes[node].processes()]
    return sorted(role for line in lines for role in ROLES if f"ray::{role}" in line)


def test_workers_lie_where_labels_say_logs_are_followed_and_ctrl_c_takes_the_run_down(
    tmp_path: Path,
) -> None:
    run_file = write_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data"),
        steps=100_000,
        address=free_address().replace("127.0.0.1", "0.0.0.0"),
        security={"insecure": True},
        dashboard={"address": free_address()},
        cluster={"worker_labels": {"zone": "data"}},
    )
    with ray_cluster(free_address(), HEADRACE_LOG_FORMAT="json") as cluster:
        start_head(cluster, "--labels", "zone=head")
        cluster.start("data", "--address", cluster.address, "--labels", "zone=data")
        with foreground(cluster, tmp_path / "up.log", "up", str(run_file)) as up:
            up.says("trainers: trainer_client.connect(")
            assert _roles(cluster, "head") == ["Keeper", "NodeController"]
            assert _roles(cluster, "data") == ["NodeLoader", "NodeLoader"]
            follow = ("logs", "controller", str(run_file), "--follow")
            with foreground(cluster, tmp_path / "follow.log", *follow) as following:
                following.says("serving run=consumed")
                assert "generation=1 begins" not in following.text()
                address = (tmp_path / "out" / "controller.address").read_text().strip()
                run = ConsumedRun(tmp_path / "out", address, drain_s=5.0)
                run.consume(1, until=5)
                following.says("generation=1 begins ranks=1")
                assert following.press_ctrl_c() == 130
            lines = [json.loads(line) for line in following.text().splitlines() if line[0] == "{"]
            assert {line["run"] for line in lines if line["logger"] != "asyncio"} >= {RUN}
            said = cluster.command("logs", "worker-0", RUN).stdout.splitlines()
            assert any(json.loads(line)["worker"] == "worker-0" for line in said if line)
            assert up.press_ctrl_c() == 130
        assert "2 loader workers have ended" in up.text()
        assert up.text().splitlines()[-1].startswith(f"headrace: run {RUN!r} was taken down")
        assert "Traceback" not in up.text()
        assert _roles(cluster, "head") == _roles(cluster, "data") == []


def test_ctrl_c_while_it_starts_leaves_nothing_and_one_that_adopted_leaves_the_run_alone(
    tmp_path: Path,
) -> None:
    run_file = write_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data"),
        address=free_address(),
        dashboard={"address": free_address()},
    )
    with ray_cluster(free_address(), RAY_AUTH_MODE="disabled") as cluster:
        start_head(cluster)
        with foreground(cluster, tmp_path / "early.log", "up", str(run_file)) as early:
            wait_until(lambda: _roles(cluster, "head") != [], timeout_s=_END_S, what="an actor")
            assert early.press_ctrl_c() == 130
        assert "Traceback" not in early.text()
        assert cluster.command("down", RUN).returncode == 0
        assert _roles(cluster, "head") == []

        up = cluster.command("up", str(run_file), "--detach", "--json")
        assert up.returncode == 0, up.stderr
        warnings = [line for line in up.stderr.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1
        assert "asks for no token" in warnings[0]
        with foreground(cluster, tmp_path / "again.log", "up", str(run_file)) as again:
            again.says("is up already")
            assert again.press_ctrl_c() == 130
        assert "was up before and stays so" in again.text()
        found = json.loads(up.stdout)
        run = ConsumedRun(tmp_path / "out", found["address"], drain_s=5.0)
        seen = []

        def after_step(step: int) -> None:
            if step == 5:
                seen.append(hear_status(found["page"], is_trained))

        run.consume(1, until=8, after_step=after_step)
        assert seen[0]["num_workers"] == [2, 2]
        assert cluster.command("down", RUN).returncode == 0
