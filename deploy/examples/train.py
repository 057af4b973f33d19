"""An ordinary data-parallel training loop on Headrace's data: `torchrun deploy/examples/train.py`.

The lines that Headrace adds to it end in `# Headrace`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import trainer_client  # Headrace
from deploy.examples.checkpoints import Checkpoints
from deploy.examples.models import SHAPES, make_model

WARM_UP_SHARE = 0.02
LOWEST_LR_SHARE = 0.1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--controller", required=True, metavar="HOST:PORT")
    parser.add_argument("--model", default="tiny", choices=list(SHAPES))
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences in a micro-batch")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--checkpoint-dir", type=Path)
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0: only at the end")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint, if any")
    parser.add_argument("--until", type=int, help="stop when so many steps of the run are done")
    parser.add_argument("--delivery-log", type=Path, help="folder for a line a sequence received")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="wait for the controller")
    arguments = parser.parse_args()
    if arguments.checkpoint_dir is None and (arguments.resume or arguments.checkpoint_every):
        parser.error("--resume and --checkpoint-every need --checkpoint-dir")
    return arguments


def learning_rate(step: int, *, num_steps: int, highest: float) -> float:
    """Warm up linearly, then fall along a cosine."""
    warm_up = max(int(num_steps * WARM_UP_SHARE), 1)
    if step < warm_up:
        return highest * (step + 1) / warm_up
    done = (step - warm_up) / max(num_steps - warm_up, 1)
    falling = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return highest * (LOWEST_LR_SHARE + (1 - LOWEST_LR_SHARE) * falling)


def update(model: torch.nn.Module, optimizer: Optimizer, lr: float) -> None:
    """Make one optimizer step."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """Train until the run's last step, or `--until`."""
    checkpoints = Checkpoints(arguments.checkpoint_dir) if arguments.checkpoint_dir else None
    saved = checkpoints.load(device) if checkpoints and arguments.resume else None
    with trainer_client.connect(  # Headrace
        arguments.controller,
        resume=saved.data if saved else None,
        timeout_s=arguments.timeout_s,
        delivery_log=arguments.delivery_log,
    ) as session:
        spec = session.spec
        torch.manual_seed(arguments.seed)
        plain = make_model(arguments.model, spec.vocab_size, spec.sequence_length).to(device)
        optimizer = AdamW(plain.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
        if saved:
            plain.load_state_dict(saved.model)
            optimizer.load_state_dict(saved.optimizer)
        distributed = dist.get_world_size() > 1
        model: Any = DistributedDataParallel(plain) if distributed else plain
        session.probe(model)  # Headrace
        num_steps = min(arguments.until or spec.num_steps, spec.num_steps)
        if session.first_step >= num_steps:
            return
        half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        for batch in session.batches(arguments.micro_batch, device):  # Headrace
            accumulating = distributed and not batch.last_of_step
            with model.no_sync() if accumulating else contextlib.nullcontext():
                with half:
                    logits = model(batch.tokens).logits
                loss = session.loss(logits, batch)  # Headrace
                loss.backward()  # type: ignore[no-untyped-call]
            if not batch.last_of_step:
                continue
            lr = learning_rate(batch.step, num_steps=spec.num_steps, highest=arguments.lr)
            update(model, optimizer, lr)
            session.end_step()  # Headrace
            done = batch.step + 1
            every = arguments.checkpoint_every
            if checkpoints and (done == num_steps or (every and done % every == 0)):
                checkpoints.save(done, plain, optimizer, session.state_dict())  # Headrace
            if done == num_steps:
                break


def run(arguments: argparse.Namespace) -> None:
    """Set the process group up, train, and take it down again."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(arguments, device)
    finally:
        dist.destroy_process_group()


@record  # so that torchrun shows what a rank died of
def main() -> int:
    """Train; what Headrace cannot do is told in one sentence."""
    try:
        run(parse_arguments())
    except trainer_client.HeadraceError as error:
        # Nothing is raised from here, and `record` writes down what is.
        get_error_handler().record_exception(error)
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the process at once.

    Gloo's threads outlive the process group, since DDP still holds it, and let go of their last
    work a little late. One that meets a Python that is shutting down aborts the process, after all
    is done and saved.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main() or 0)
