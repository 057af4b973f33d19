"""Ray clusters of a test's own, with a token: each node is a `ray start` and what it started."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.harness_runs import MARK, ROOT, marked_processes

_UP_S = 90.0
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_STORE_BYTES = "80000000"


@dataclass(kw_only=True)
class RayNode:
    """A node of a cluster, and all processes that it started."""

    name: str
    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Return the node's processes that live, of all namespaces."""
        return marked_processes(self.mark)

    def kill(self) -> int:
        """Kill all of it at once, as a machine that loses power; return how many processes."""
        processes = self.processes()
        for process in processes:
            _kill(process)
        self.process.wait(10)
        return len(processes)


def _kill(process: psutil.Process) -> None:
    """Kill a process that may have ended meanwhile."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@dataclass(kw_only=True)
class RayCluster:
    """A cluster; `environment` lets a command in."""

    folder: Path
    address: str
    environment: dict[str, str]
    nodes: dict[str, RayNode] = field(default_factory=dict)

    def start(
        self, name: str, *options: str, prefix: Sequence[str] = (), num_cpus: int = 4
    ) -> RayNode:
        """Start a node and return when it is there; `prefix` puts it into a namespace."""
        mark = uuid.uuid4().hex
        log = self.folder / f"{name}.log"
        temporary = self.folder / name
        temporary.mkdir()
        shared = ["--num-cpus", str(num_cpus), "--object-store-memory", _STORE_BYTES]
        shared += ["--disable-usage-stats", "--block", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*prefix, *_RAY, "start", *shared],
                cwd=ROOT,
                env={**self.environment, MARK: mark, "TMPDIR": str(temporary)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = RayNode(name=name, process=process, mark=mark, log=log)
        self.nodes[name] = node
        deadline = time.monotonic() + _UP_S
        while not re.search(r"Ray runtime started", log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return node

    def command(
        self,
        *arguments: str,
        prefix: Sequence[str] = (),
        timeout_s: float = 120,
        folder: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run `headrace` with these arguments, let into the cluster."""
        return subprocess.run(
            [*prefix, sys.executable, "-m", "deploy.cli", *arguments],
            cwd=folder,
            env={**self.environment, "RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def end(self) -> None:
        """Kill all nodes; twice does no harm."""
        for node in self.nodes.values():
            node.kill()


@contextmanager
def ray_cluster(address: str, **environment: str) -> Iterator[RayCluster]:
    """Prepare a cluster whose head will be at `address`; at the end nothing of it is left."""
    # Short, as Ray puts sockets below it.
    folder = Path(tempfile.mkdtemp(prefix="hrc-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    cluster = RayCluster(
        folder=folder,
        address=address,
        environment={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            **environment,
        },
    )
    try:
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def start_head(
    cluster: RayCluster,
    *options: str,
    prefix: Sequence[str] = (),
    num_cpus: int = 4,
    name: str = "head",
) -> RayNode:
    """Start the cluster's head where its address says; a second one needs another name."""
    port = cluster.address.rpartition(":")[2]
    where = ["--head", "--port", port, "--include-dashboard", "false"]
    where += ["--temp-dir", str(cluster.folder / "r"), *options]
    return cluster.start(name, *where, prefix=prefix, num_cpus=num_cpus)
