"""Ray's own store (`gcs_server`) killed, and with it the head: ranks train on, `up` goes on after.

Each node is a machine of its own: a network namespace, and a process namespace, in which a
`ray start` sees its own processes alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from protos.client import AdminClient
from protos.status import RunStatus
from tests.fakes_consumer import write_corpus, write_run
from tests.faults.checker import check, longest_wait_s, read_evidence
from tests.faults.processes import PLENTY_S, FaultRun
from tests.harness_runs import wait_until
from tests.net_nodes import Network, network
from tests.ray_clusters import ray_cluster, start_head

pytestmark = [pytest.mark.long, pytest.mark.timeout(590)]

STEP_S = 0.1
WATCHED_S = 65.0
"""Longer than Ray's nodes outlive their head, unless their environment says otherwise."""

DEGRADED_AFTER_S = 5.0
DATA_TIMEOUT_S = 240.0
"""For a new head, a new node and `headrace up`, on a busy machine."""

RECONNECT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""As the guide to Ray clusters says."""


def _on(net: Network, name: str) -> list[str]:
    return [*net.on(name), "unshare", "--pid", "--fork", "--mount-proc"]


@pytest.mark.fault_row(18, "Ray's gcs_server SIGKILL, and with it the head node")
def test_ranks_train_on_without_rays_head_and_a_new_one_goes_on_with_the_ledger(
    tmp_path: Path, record_injections: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    began_s = time.monotonic()

    def note(line: str) -> None:
        lines.append(f"{time.monotonic() - began_s:6.1f} s  {line}")

    with network() as net:
        addresses = {name: net.add(name) for name in ("head", "n1", "n2")}
        run_file = write_run(
            tmp_path / "out",
            write_corpus(tmp_path / "data", documents=(600, 450, 300)),
            steps=100_000,
            address="0.0.0.0:7700",
            workers={"count": 2},
            policy={"name": "odm", "warmup_steps": 10},
            control={
                "degraded_after_s": DEGRADED_AFTER_S,
                "data_timeout_s": DATA_TIMEOUT_S,
            },
            security={"insecure": True},
        )
        at = f"{addresses['head']}:7700"
        run = FaultRun(
            run_file=run_file,
            out=tmp_path / "out",
            address=at,
            controller=None,  # type: ignore[arg-type]  # Ray looks after it
        )

        def status() -> RunStatus:
            with closing(AdminClient(at)) as admin:
                return admin.status(timeout_s=PLENTY_S)

        with ray_cluster(f"{addresses['head']}:6379", **RECONNECT) as cluster:

            def join_head(name: str) -> None:
                where = ("--address", cluster.address, "--node-ip-address", addresses[name])
                cluster.start(name, *where, prefix=_on(net, name))

            def headrace(*arguments: str) -> str:
                done = cluster.command(*arguments, prefix=net.on("head"), timeout_s=240)
                assert done.returncode == 0, done.stderr
                return done.stdout

            at_head = ("--node-ip-address", addresses["head"])
            head = start_head(cluster, *at_head, prefix=_on(net, "head"), num_cpus=0)
            join_head("n1")
            first = json.loads(headrace("up", str(run_file), "--detach", "--json"))
            assert first["address"] == at
            options = ["--timeout-s", "120"]
            run.start_ranks(2, until=100_000, step_s=STEP_S, options=options)
            try:
                run.wait_observed(20, timeout_s=120)
                (store,) = [each for each in head.processes() if each.name() == "gcs_server"]
                store.kill()
                killed_s, killed_at = time.monotonic(), run.last_logged_step()
                note(f"gcs_server {store.pid} killed after step {killed_at}")
                # `ray start --block` takes the rest of its node down.
                wait_until(lambda: not head.processes(), timeout_s=60, what="the head to end")
                time.sleep(max(WATCHED_S - (time.monotonic() - killed_s), 0.0))  # the fault itself
                assert run.are_training(), run.ranks[0].log.read_text()[-2000:]
                trained = run.last_logged_step() - killed_at
                note(f"{trained} steps in {time.monotonic() - killed_s:.1f} s without Ray's head")
                assert trained >= 0.5 * (WATCHED_S - DEGRADED_AFTER_S) / STEP_S

                start_head(cluster, *at_head, prefix=_on(net, "head"), num_cpus=0, name="head-2")
                # A node of the old cluster ends when it meets the new one.
                wait_until(
                    lambda: not cluster.nodes["n1"].processes(), timeout_s=60, what="n1 to end"
                )
                join_head("n2")
                note("a new head, and a new node")
                again = json.loads(headrace("up", str(run_file), "--detach", "--json"))
                note(f"headrace up: {again}")
                assert again["address"] == at
                assert not again["adopted"]
                before = run.last_logged_step()
                wait_until(
                    lambda: run.last_logged_step() >= before + 30, timeout_s=120, what="30 steps"
                )
                run.wait_observed(before + 20, timeout_s=120)
                note(f"step {run.last_logged_step()}, by the same ranks")
                assert run.are_training()
                assert status().generation == 1
                last = run.last_logged_step()
                run.wait_observed(last)
            finally:
                for rank in run.ranks:
                    rank.process.kill()
                    rank.process.wait(PLENTY_S)
            headrace("down", str(run_file))
    assert check(run.out) == []
    evidence, findings = read_evidence(run.out)
    assert findings.record.num_generations == 1
    waited_s = longest_wait_s(evidence)
    note(f"longest wait of a step {waited_s:.1f} s: while no node was there that has workers")
    with capsys.disabled():
        print("", *lines, sep="\n")
    record_injections(1, f"{trained} steps without Ray's head, then {last - before} with a new one")
