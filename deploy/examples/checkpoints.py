"""Checkpoints that are there in full or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import trainer_client

_MODEL = "model.pt"
_DATA = "data.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What a checkpoint holds."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    data: dict[str, Any]
    """All ranks' places in the data; any number of ranks can resume from it."""


class Checkpoints:
    """`step-N` folders; N optimizer steps were done when one was written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, device: torch.device) -> Saved | None:
        """Return the newest checkpoint; None if there is none."""
        found = sorted(self._folder.glob("step-*"))
        if not found:
            return None
        tensors = torch.load(found[-1] / _MODEL, map_location=device, weights_only=True)
        data = json.loads((found[-1] / _DATA).read_text())
        return Saved(model=tensors["model"], optimizer=tensors["optimizer"], data=data)

    def save(
        self, done: int, model: nn.Module, optimizer: Optimizer, data: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint; all ranks call it, and rank 0 gives it its name at the end."""
        partial = self._folder / f".partial-{done:08d}"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        (partial / f"data.rank{dist.get_rank()}.json").write_text(json.dumps(data))
        dist.barrier()
        if dist.get_rank() == 0:
            parts = [json.loads(path.read_text()) for path in partial.glob("data.rank*.json")]
            (partial / _DATA).write_text(json.dumps(trainer_client.merge_states(parts)))
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(tensors, partial / _MODEL)
            _publish(partial, self._folder / f"step-{done:08d}")
        dist.barrier()


def _publish(partial: Path, final: Path) -> None:
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():  # of a run that went back to an earlier step
        replaced = final.with_name(f".replaced-{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
