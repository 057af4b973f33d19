"""A Ray cluster of several machines, each with an address of its own, one of which vanishes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.history import read_deliveries
from deploy.training import RECEIVED
from protos.client import AdminClient
from protos.security import Security, split_address
from protos.status import RunStatus
from tests.fakes_consumer import (
    DOMAINS,
    consumed_run,
    global_batches,
    write_corpus,
    write_run,
)
from tests.fakes_security import Authority, make_token, write_tokens
from tests.faults.checker import check
from tests.faults.processes import FaultRun, RankProcess
from tests.harness_runs import wait_until
from tests.net_nodes import Network, network
from tests.ray_clusters import RayCluster, ray_cluster, start_head

pytestmark = [pytest.mark.long, pytest.mark.timeout(540)]

NUM_STEPS = 500
STEP_S = 0.1
VANISHES_AFTER = 80
WORKERS = 4
NODES = ("n1", "n2", "n3")


@dataclass(kw_only=True)
class Machines:
    """A cluster of a head without CPUs and nodes for workers, and a machine for trainers."""

    net: Network
    cluster: RayCluster
    addresses: dict[str, str]
    security: Security
    run_file: Path
    out: Path

    def headrace(self, *arguments: str, timeout_s: float = 240) -> str:
        """Run a command on the head; return what it printed."""
        done = self.cluster.command(*arguments, prefix=self.net.on("head"), timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> RunStatus:
        """Return the controller's word, from this machine."""
        address = f"{self.addresses['head']}:7700"
        with closing(AdminClient(address, security=self.security)) as admin:
            return admin.status(timeout_s=60)

    def workers_by_node(self) -> dict[str, int]:
        """Return how many workers the controller hears from each node."""
        names = {address: name for name, address in self.addresses.items()}
        found = dict.fromkeys(NODES, 0)
        for worker in self.status().workers:
            if worker.alive:
                found[names[split_address(worker.endpoint)[0]]] += 1
        return found

    def rank(self, rank: int, world_size: int) -> RankProcess:
        """Start a rank on the trainers' machine."""
        shown = [
            "env",
            f"HEADRACE_CA={self.security.ca}",
            f"HEADRACE_JOIN_TOKEN_FILE={self.security.join_token_file}",
        ]
        run = FaultRun(
            run_file=self.run_file,
            out=self.out,
            address=f"{self.addresses['head']}:7700",
            controller=None,  # type: ignore[arg-type]  # Ray looks after it
        )
        return RankProcess(
            run,
            rank,
            world_size,
            until=NUM_STEPS,
            step_s=STEP_S,
            options=("--timeout-s", "120"),
            prefix=(*self.net.on("trainers"), *shown),
        )


@contextmanager
def machines(folder: Path, patterns: dict[str, str]) -> Iterator[Machines]:
    """Make a cluster of a head, three nodes and the trainers' machine; end all of it."""
    out = folder / "out"
    with network() as net:
        addresses = {name: net.add(name) for name in ("head", *NODES, "trainers")}
        authority = Authority(folder / "tls", "authority")
        names = ",".join(f"IP:{address}" for address in addresses.values())
        cert, key = authority.issue("node", names=names)
        join = write_tokens(folder / "join", make_token())
        admin = write_tokens(folder / "admin", make_token())
        run_file = write_run(
            out,
            patterns,
            steps=NUM_STEPS,
            address="0.0.0.0:7700",
            workers={"count": WORKERS},
            security={
                "tls": {"cert": str(cert), "key": str(key), "ca": str(authority.pem)},
                "join_token_file": str(join),
                "admin_token_file": str(admin),
            },
        )
        with ray_cluster(f"{addresses['head']}:6379") as cluster:
            at_head = ("--node-ip-address", addresses["head"])
            start_head(cluster, *at_head, prefix=net.on("head"), num_cpus=0)
            for name in NODES:
                join_head = ("--address", cluster.address)
                cluster.start(
                    name, *join_head, "--node-ip-address", addresses[name], prefix=net.on(name)
                )
            yield Machines(
                net=net,
                cluster=cluster,
                addresses=addresses,
                security=Security(ca=authority.pem, join_token_file=join, admin_token_file=admin),
                run_file=run_file,
                out=out,
            )


@pytest.mark.fault_row(19, "node with loader workers vanishes")
def test_a_vanished_nodes_lanes_are_served_elsewhere_and_no_batch_differs(
    tmp_path: Path,
    record_injections: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    patterns = write_corpus(tmp_path / "data", documents=(600, 450, 300))
    undisturbed = write_run(tmp_path / "undisturbed", patterns, steps=NUM_STEPS)
    with consumed_run(undisturbed) as run:
        run.consume(2, until=NUM_STEPS)
        expected = global_batches(run.deliveries())
    lines: list[str] = []
    began = time.monotonic()

    def note(line: str) -> None:
        lines.append(f"{time.monotonic() - began:6.1f} s  {line}")

    with machines(tmp_path, patterns) as there:
        note(f"Ray: a head without CPUs, nodes {', '.join(NODES)}")
        up_s = time.monotonic()
        found = json.loads(there.headrace("up", str(there.run_file), "--detach", "--json"))
        note(f"headrace up took {time.monotonic() - up_s:.1f} s; {found['workers']}")
        before = there.workers_by_node()
        assert sum(before.values()) == WORKERS
        assert sum(count > 0 for count in before.values()) >= 2, "workers lie on several nodes"
        ranks = [there.rank(number, 2) for number in range(2)]
        wait_until(
            lambda: there.status().observed_step >= VANISHES_AFTER,
            timeout_s=120,
            what=f"step {VANISHES_AFTER}",
        )
        victim = max(NODES, key=lambda name: before[name])
        lost = there.addresses[victim]
        streams = sum(bool(each.lanes) for each in there.status().workers if lost in each.endpoint)
        assert streams, "the node that vanishes serves lanes"
        there.net.cut(victim)
        num_killed = there.cluster.nodes[victim].kill()
        record_injections(1, f"{num_killed} processes and the cable of a node")
        cut_at, cut_s = there.status().observed_step, time.monotonic()
        note(f"{victim} vanishes after step {cut_at}: cable cut, {num_killed} processes killed")

        def served_elsewhere() -> bool:
            status = there.status()
            serving = [each for each in status.workers if each.lanes]
            lanes = {lane for each in serving for lane in each.lanes}
            others = all(lost not in each.endpoint for each in serving)
            return others and len(lanes) == 5 and status.observed_step > cut_at + 20

        wait_until(served_elsewhere, timeout_s=120, what="all lanes on other nodes, steps going on")
        note(f"all lanes on other nodes and 20 more steps after {time.monotonic() - cut_s:.1f} s")
        wait_until(
            lambda: (
                sum(there.workers_by_node().values()) == WORKERS
                and not there.workers_by_node()[victim]
            ),
            timeout_s=180,
            what="as many workers as before, on the nodes that are left",
        )
        note(f"{WORKERS} workers again after {time.monotonic() - cut_s:.1f} s: "
             f"{there.workers_by_node()}")  # fmt: skip
        for rank in ranks:
            rank.wait(240)
        note(f"both ranks have trained {NUM_STEPS} steps")
        kept = there.headrace("logs", "keeper", there.run_file.as_posix())
        down = there.headrace("down", str(there.run_file))
        note(f"headrace down: {down.splitlines()[-1]}")
    assert global_batches(read_deliveries(there.out / RECEIVED, DOMAINS)) == expected
    assert check(there.out) == []
    with capsys.disabled():
        print("", *lines, "keeper:", *kept.splitlines(), sep="\n")
