"""What each of four ranks does on a 2 x 2 mesh, of which only the data-parallel ones pull.

Run by torchrun with a controller's address and a folder; writes one file a rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import trainer_client
from protos.errors import HeadraceError
from tests.fakes_model import Block


class Model(torch.nn.Module):
    """Tensor-parallel blocks between an embedding and a head."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 12)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(12, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


def train(address: str, folder: Path) -> dict[str, Any]:
    """Train until the data ends or fails; return what this rank saw."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seen: list[list[int]] = []
    with trainer_client.connect(address, mesh=mesh, delivery_log=folder / "log") as session:
        torch.manual_seed(0)
        model = Model(session.spec.vocab_size)
        for block in model.blocks:
            plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        session.probe(model, norms=False)
        state, told, began = session.state_dict(), "", time.monotonic()
        try:
            for batch in session.batches(micro_batch=4):
                began = time.monotonic()
                session.loss(model(batch.tokens), batch).backward()  # type: ignore[no-untyped-call]
                seen += [
                    [int(batch.step), slot, *batch.tokens[row].tolist()]
                    for row, slot in enumerate(batch.slots)
                ]
                if batch.last_of_step:
                    session.end_step()
                    state = session.state_dict()
        except HeadraceError as error:
            told = f"{type(error).__name__}: {error}"
        return {
            "place": [session.rank, session.world_size],
            "generation": session.generation,
            "seen": seen,
            "state": state,
            "error": told,
            "error_after_s": time.monotonic() - began,
        }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = train(sys.argv[1], Path(sys.argv[2]))
    (Path(sys.argv[2]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    # Gloo's threads still wait for what the rank that failed did not send; see examples/train.py.
    os._exit(0)
