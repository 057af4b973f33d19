"""How long a decision takes, and how long a rank needs to start: `make bench-latency`.

Two rank processes train a tiny model for 1,000 steps on a real controller (policy `odm`, lag 2) and
a real worker process. For every step of both: from `end_step`, just after the last backward pass,
to the controller's answer to the report, and to the sealed plan's arrival at whoever watches plans,
as workers do. All clocks are one machine's. Also: from `connect` to the first batch, and the import
of `trainer_client` beyond torch's own. Writes `build/bench/latency.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import trainer_client
from protos.client import ControlClient
from protos.errors import HeadraceError
from protos.types import ReportAnswer, StepReport
from tests.fakes_consumer import consumed_run, write_corpus, write_run

OUT = Path("build/bench/latency.json")
LAG = 2
WORLD_SIZE = 2
WIDTH = 512


def train(address: str, rank: int, path: Path) -> None:
    """Train as one rank; write when each step ended and when its report was answered."""
    torch.set_num_threads(1)
    began = time.time()
    ended: dict[int, float] = {}
    answered: dict[int, float] = {}
    waited: list[float] = []
    with trainer_client.connect(address, rank=rank, world_size=WORLD_SIZE) as session:
        send = session._reporter._send

        def note(reports: Sequence[StepReport], timeout_s: float) -> ReportAnswer:
            answer = send(reports, timeout_s)
            answered.update({int(report.step): time.time() for report in reports})
            return answer

        session._reporter._send = note
        model = nn.Sequential(nn.Embedding(4096, WIDTH), nn.Linear(WIDTH, 4096))
        first_batch = 0.0
        before = 0.0
        for batch in session.batches(micro_batch=20):
            first_batch = first_batch or time.time()
            waited.append(session.data_wait_s - before)
            before = session.data_wait_s
            session.loss(model(batch.tokens), batch).backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            ended[int(batch.step)] = time.time()
            session.end_step()
        session._reporter.flush(timeout_s=30)
    found = {
        "ended": ended,
        "answered": answered,
        "first_batch_s": first_batch - began,
        "waited": waited,
    }
    path.write_text(json.dumps(found))


class Watcher(threading.Thread):
    """Hears of sealed plans as a worker does, and notes when."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._control = ControlClient(address)
        self.sealed: dict[int, float] = {}
        self.through = -1

    def run(self) -> None:
        """Listen until the controller goes."""
        try:
            for event in self._control.watch_plans("bench"):
                now = time.time()
                if event.reset:
                    self.through = -1
                for step in range(self.through + 1, event.sealed_through + 1):
                    self.sealed[step] = now
                self.through = max(self.through, event.sealed_through)
        except HeadraceError:
            return


def measure(folder: Path, num_steps: int) -> dict[str, Any]:
    """Run the job; return all figures."""
    run_file = write_run(
        folder / "out",
        write_corpus(folder / "data"),
        steps=num_steps,
        data={"vocab_size": 4096},
        policy={"name": "odm"},
        control={"lag": LAG},
    )
    spawn = multiprocessing.get_context("spawn")
    with consumed_run(run_file) as run:
        watcher = Watcher(run.address)
        watcher.start()
        paths = [folder / f"rank{rank}.json" for rank in range(WORLD_SIZE)]
        ranks = [
            spawn.Process(target=train, args=(run.address, rank, path))
            for rank, path in enumerate(paths)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        told = [json.loads(path.read_text()) for path in paths]
        sealed = dict(watcher.sealed)
    return summary(told, sealed, num_steps)


def summary(told: list[dict[str, Any]], sealed: dict[int, float], num_steps: int) -> dict[str, Any]:
    """Return percentiles in milliseconds."""
    answers, plans = [], []
    for step in range(num_steps - LAG):
        key = str(step)
        answers += [one["answered"][key] - one["ended"][key] for one in told]
        plans.append(sealed[step + LAG] - max(one["ended"][key] for one in told))
    steps = [np.diff(sorted(one["ended"].values())) for one in told]
    return {
        "steps": num_steps,
        "ranks": len(told),
        "report_answered_ms": _percentiles(answers),
        "plan_sealed_ms": _percentiles(plans),
        "step_ms": _percentiles(np.concatenate(steps)),
        "data_wait_ms": _percentiles(np.concatenate([one["waited"][1:] for one in told])),
        "connect_to_first_batch_s": max(one["first_batch_s"] for one in told),
        "import_beyond_torch_s": import_time_s(),
    }


def _percentiles(seconds: Any) -> dict[str, float]:
    values = 1000 * np.percentile(np.asarray(seconds), (50, 99))
    return {"p50": round(float(values[0]), 2), "p99": round(float(values[1]), 2)}


def import_time_s() -> float:
    """Return the least of some imports, each in a process of its own that has torch already."""
    code = (
        "import torch, time; began = time.perf_counter(); import trainer_client; "
        "print(time.perf_counter() - began)"
    )
    tries = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    return min(float(one.stdout) for one in tries)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.steps)
    print(json.dumps(found, indent=1))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
