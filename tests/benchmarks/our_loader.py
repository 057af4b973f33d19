"""Headrace on the benchmark's work: a controller, one loader worker and a trainer, as processes.

    python -m tests.benchmarks.our_loader prepare DATA
    python -m tests.benchmarks.our_loader run DATA SECONDS RESULT.json CASE.json
    python -m tests.benchmarks.our_loader change DATA SECONDS RESULT.json CASE.json

The trainer is this process: `connect`, `batches`, `end_step`, and nothing between. All settings
that the run file leaves open are the defaults, `control.lag: 2` among them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import yaml

import trainer_client
from controller.config import load_run_file
from deploy.dataset import ensure_index
from protos.client import AdminClient
from tests.benchmarks import workload
from tests.benchmarks.workload import BATCH, NUM_DOMAINS, NUM_SHARDS, SHARES

_STEPS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What of ours is measured."""

    global_sequences: int
    """In a step; the trainer takes them in batches of 16."""

    workers: int = 1
    policy: str = "static"
    """`static`, or a policy that learns from what the trainer reports."""

    step_s: float = 0.0
    """What the trainer takes for a step beside waiting for it."""


def prepare(data: Path) -> None:
    """Write the shards, index them, and have a worker fill its cache."""
    for domain in range(NUM_DOMAINS):
        folder = data / "shards" / f"domain{domain}"
        folder.mkdir(parents=True, exist_ok=True)
        for shard in range(NUM_SHARDS):
            path = folder / f"{shard:04d}.tar"
            if not path.exists():
                _write_shard(path.with_suffix(".part"), domain, shard)
                path.with_suffix(".part").rename(path)
    ensure_index(load_run_file(_run_file(data, data, Case(global_sequences=512))))
    run(data, seconds=1.0, case=Case(global_sequences=512))


def _write_shard(path: Path, domain: int, shard: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, document in enumerate(workload.documents(domain, shard)):
            info = tarfile.TarInfo(f"{number:06d}.u16")
            info.size = document.nbytes
            tar.addfile(info, io.BytesIO(document.tobytes()))


@dataclass(frozen=True, kw_only=True)
class Served:
    """A controller with its loader workers."""

    controller: str
    names: Mapping[int, str]
    """What the processes are, by process id."""


@contextlib.contextmanager
def serving(
    data: Path,
    *,
    cache: Path,
    case: Case,
    shares: Sequence[float] = SHARES,
) -> Iterator[Served]:
    """Start a controller and loader workers on the prepared shards; stop them at the end."""
    out = data / f"run-{case.global_sequences}-{case.policy}-{case.workers}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run_file = _run_file(data, out, case, shares=shares)
    with contextlib.ExitStack() as stack:
        pid, address = stack.enter_context(
            _process(["-m", "controller", str(run_file)], out / "controller.log")
        )
        names = {pid: "controller"}
        for number in range(case.workers):
            worker, _ = stack.enter_context(
                _process(
                    ["-m", "loader_workers", "--controller", address, "--cache", str(cache)],
                    out / f"worker-{number}.log",
                )
            )
            names[worker] = f"worker {number}"
        yield Served(controller=address, names=names)


def run(data: Path, *, seconds: float, case: Case) -> workload.Measured:
    """Start controller and workers, consume, and stop them."""
    with serving(data, cache=data / "cache", case=case) as served:
        opened_at = time.perf_counter()
        with trainer_client.connect(served.controller, rank=0, world_size=1) as session:
            return workload.measure(
                _batches(session), opened_at=opened_at, seconds=seconds, names=served.names
            )


def _batches(session: trainer_client.Session) -> workload.Sequences:
    for batch in session.batches(micro_batch=BATCH):
        yield batch.labels, batch.domain_ids
        if batch.last_of_step:
            session.end_step()


def change(data: Path, *, seconds: float, case: Case) -> dict[str, float]:
    """Return how soon a mixture that an operator sets is obeyed, while the trainer runs on.

    Half of the time is for the trainer to come up to its pace.
    """
    with (
        serving(data, cache=data / "cache", case=case) as served,
        contextlib.closing(AdminClient(served.controller)) as admin,
        trainer_client.connect(served.controller, rank=0, world_size=1) as session,
    ):
        asking = threading.Thread(target=admin.set_mixture, args=({"domain7": 1.0},))
        ends_at = time.perf_counter() + seconds
        asked_at, asked_step, began_at = 0.0, 0, time.perf_counter()
        for batch in session.batches(micro_batch=case.global_sequences):
            now = time.perf_counter()
            if asking.ident is None:
                if now > ends_at - seconds / 2:
                    asked_at, asked_step = now, int(batch.step)
                    asking.start()
            elif now > ends_at or bool((batch.domain_ids == NUM_DOMAINS - 1).all()):
                break
            time.sleep(case.step_s)
            session.end_step()
        asking.join()
    if now > ends_at:
        raise RuntimeError(f"the mixture was not obeyed within {seconds / 2:g} s")
    return {
        "steps_after_the_request": int(batch.step) - asked_step,
        "ms_after_the_request": (now - asked_at) * 1000,
        "step_ms": (asked_at - began_at) * 1000 / asked_step,
    }


def _run_file(data: Path, out: Path, case: Case, *, shares: Sequence[float] = SHARES) -> Path:
    path = out / "run.yaml"
    domains = [f"domain{domain}" for domain in range(NUM_DOMAINS)]
    document = {
        "run": "bench",
        "seed": workload.SEED,
        "steps": _STEPS,
        "out": str(out),
        "address": "127.0.0.1:0",
        "data": {
            "index": str(data / "index.parquet"),
            "vocab_size": workload.VOCAB_SIZE,
            "eot_id": workload.EOT_ID,
            "domains": {
                name: {"shards": [str(data / "shards" / name / "*.tar")]} for name in domains
            },
        },
        "batch": {
            "global_sequences": case.global_sequences,
            "sequence_length": workload.SEQUENCE_LENGTH,
            "lanes": 4,
        },
        "policy": {"name": case.policy},
    }
    if case.policy == "static":
        document["policy"] = {
            "name": "static",
            "mixture": dict(zip(domains, shares, strict=True)),
        }
    path.write_text(yaml.safe_dump(document))
    return path


@contextlib.contextmanager
def _process(arguments: list[str], log: Path) -> Iterator[tuple[int, str]]:
    """Start a process that prints its address once it serves; yield its pid and the address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        try:
            yield process.pid, _address(process.stdout, log)
        finally:
            process.terminate()
            process.wait(timeout=30)
            process.stdout.close()


def _address(output: IO[str], log: Path) -> str:
    for line in output:
        last = line.split()[-1] if line.split() else ""
        if ":" in last and last.rsplit(":", 1)[1].isdigit():
            return last
    raise RuntimeError(f"a process of the benchmark ended early; see {log}")


def main() -> None:
    action, data, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if action == "prepare":
        prepare(Path(data))
        return
    seconds, result, case_file = rest
    case = Case(**json.loads(Path(case_file).read_text()))
    if action == "change":
        found = change(Path(data), seconds=float(seconds), case=case)
        Path(result).write_text(json.dumps(found))
        return
    measured = run(Path(data), seconds=float(seconds), case=case)
    workload.write_result(measured, Path(result))


if __name__ == "__main__":
    main()
