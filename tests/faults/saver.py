"""Saves checkpoints over and over until it is killed, many times: `python -m tests.faults.saver`.

Each saver is a fork that knows torch already. After each kill the newest checkpoint is loaded as a
trainer would; model and place in the data must be of one step. Says how often on stdout.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from deploy.examples.checkpoints import Checkpoints
from trainer_client.checkpoint import STATE_VERSION


def _save_for_ever(folder: Path, first: int) -> None:
    meeting = f"file://{folder}/meeting-{os.getpid()}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    model = nn.Linear(256, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = first
    while True:
        done += 1
        with torch.no_grad():
            model.weight.fill_(float(done))
        cursors = {"0": [[0, 0, done]]}
        data = {"version": STATE_VERSION, "run_id": "run", "order_sha256": "", "step": done}
        checkpoints = Checkpoints(folder)
        checkpoints.save(done, model, optimizer, {**data, "world_size": 1, "cursors": cursors})


def _newest_step(folder: Path) -> int:
    """Return the newest checkpoint's step.

    Raises:
        AssertionError: its model is of another step than its place in the data.
    """
    saved = Checkpoints(folder).load(torch.device("cpu"))
    if saved is None:
        return 0
    step = int(saved.data["step"])
    trained = saved.model["weight"]
    assert bool((trained == float(step)).all()), (step, float(trained.flatten()[0]))
    assert saved.data["cursors"]["0"] == [[0, 0, step]]
    return step


def _in_fork(compute: Callable[[], int], answer: Path) -> int:
    """Return what a process of its own computes.

    Raises:
        AssertionError: it failed; its traceback is on stderr.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            answer.write_text(str(compute()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0
    return int(answer.read_text())


def main() -> int:
    """Kill so many savers; return the exit status."""
    folder, num_kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    draw, step, unfinished = random.Random(5), 0, 0
    for _ in range(num_kills):
        # This process itself computes nothing: torch's threads would not outlive a fork.
        child = os.fork()
        if child == 0:
            _save_for_ever(folder, step)
        while not (folder / f"step-{step + 1:08d}").exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        newest = _in_fork(lambda: _newest_step(folder), folder / "newest")
        assert newest >= step
        step = newest
        unfinished += len(list(folder.glob(".partial-*"))) > 0
    print(f"{num_kills} {unfinished} {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
