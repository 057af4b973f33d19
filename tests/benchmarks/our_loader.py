"""Headrace on the benchmark's work: a controller, one loader worker and a trainer, as processes.

    python -m tests.benchmarks.our_loader prepare DATA
    python -m tests.benchmarks.our_loader run DATA SECONDS RESULT.json GLOBAL_SEQUENCES

The trainer is this process: `connect`, `batches`, `end_step`, and nothing between.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
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
from tests.benchmarks import workload
from tests.benchmarks.workload import BATCH, NUM_DOMAINS, NUM_SHARDS, SHARES

_STEPS = 1 << 30
_LAG = 256
"""A static mixture needs no reports, so its plans may be sealed far ahead; an operator's override
then takes effect so many steps later."""


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
    ensure_index(load_run_file(_run_file(data, data, 512)))
    run(data, seconds=1.0, global_sequences=512)


def _write_shard(path: Path, domain: int, shard: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, document in enumerate(workload.documents(domain, shard)):
            info = tarfile.TarInfo(f"{number:06d}.u16")
            info.size = document.nbytes
            tar.addfile(info, io.BytesIO(document.tobytes()))


@dataclass(frozen=True, kw_only=True)
class Served:
    """A controller with one loader worker."""

    controller: str
    names: Mapping[int, str]
    """What the processes are, by process id."""


@contextlib.contextmanager
def serving(
    data: Path,
    *,
    cache: Path,
    global_sequences: int,
    lag: int = _LAG,
    shares: Sequence[float] = SHARES,
) -> Iterator[Served]:
    """Start a controller and a loader worker on the prepared shards; stop them at the end."""
    out = data / f"run-{global_sequences}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run_file = _run_file(data, out, global_sequences, lag=lag, shares=shares)
    with (
        _process(["-m", "controller", str(run_file)], out / "controller.log") as controller,
        _process(
            ["-m", "loader_workers", "--controller", controller[1], "--cache", str(cache)],
            out / "worker.log",
        ) as worker,
    ):
        yield Served(
            controller=controller[1], names={controller[0]: "controller", worker[0]: "worker"}
        )


def run(data: Path, *, seconds: float, global_sequences: int) -> workload.Measured:
    """Start controller and worker, consume, and stop them."""
    with serving(data, cache=data / "cache", global_sequences=global_sequences) as served:
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


def _run_file(
    data: Path,
    out: Path,
    global_sequences: int,
    *,
    lag: int = _LAG,
    shares: Sequence[float] = SHARES,
) -> Path:
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
            "global_sequences": global_sequences,
            "sequence_length": workload.SEQUENCE_LENGTH,
            "lanes": 4,
        },
        "policy": {"name": "static", "mixture": dict(zip(domains, shares, strict=True))},
        "control": {"lag": lag},
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
    seconds, result, global_sequences = rest
    measured = run(Path(data), seconds=float(seconds), global_sequences=int(global_sequences))
    workload.write_result(measured, Path(result))


if __name__ == "__main__":
    main()
