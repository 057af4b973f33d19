"""Where an interrupted trial goes on: written at evaluations, there in full or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controller.policy import artefact
from controller.policy.base import PolicyState
from deploy.compare.record import Evaluation, Interval
from deploy.compare.tally import Totals
from protos.types import Cursors, Lane

_TENSORS = "learner.pt"
_POLICY = "policy.safetensors"
_VALUES = "trial.json"


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Checkpoint:
    """A trial between two steps."""

    next_step: int
    learner: dict[str, Any]
    policy: PolicyState
    plans: list[dict[str, Any]]
    cursors: Cursors
    evaluations: list[Evaluation]
    intervals: list[Interval]
    totals: Totals


class Checkpoints:
    """The newest checkpoint of a trial, in a folder named by its step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "checkpoints"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop the one before it."""
        final = self._folder / f"before-{checkpoint.next_step:08d}"
        partial = self._folder / f".partial-{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        torch.save(checkpoint.learner, partial / _TENSORS)
        artefact.save(checkpoint.policy, partial / _POLICY)
        (partial / _VALUES).write_text(json.dumps(_values(checkpoint), allow_nan=False))
        older = self._found()
        partial.rename(final)
        for folder in older:
            shutil.rmtree(folder)

    def load(self) -> Checkpoint | None:
        """Return the newest checkpoint; None: there is none."""
        found = self._found()
        if not found:
            return None
        folder = found[-1]
        values = json.loads((folder / _VALUES).read_text())
        return Checkpoint(
            next_step=values["next_step"],
            learner=torch.load(folder / _TENSORS, weights_only=True),
            policy=artefact.load(folder / _POLICY),
            plans=values["plans"],
            cursors={
                Lane(int(lane)): np.asarray(places, dtype=np.uint32)
                for lane, places in values["cursors"].items()
            },
            evaluations=[Evaluation(**each) for each in values["evaluations"]],
            intervals=[Interval(**each) for each in values["intervals"]],
            totals=Totals.from_values(values["totals"]),
        )

    def newest_step(self) -> int | None:
        """Return the step at which the trial would go on; None: at its beginning."""
        found = self._found()
        return int(found[-1].name.rpartition("-")[2]) if found else None

    def remove(self) -> None:
        """Drop all of them: the trial is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob("before-*"))


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "next_step": checkpoint.next_step,
        "plans": checkpoint.plans,
        "cursors": {int(lane): places.tolist() for lane, places in checkpoint.cursors.items()},
        "evaluations": [asdict(each) for each in checkpoint.evaluations],
        "intervals": [asdict(each) for each in checkpoint.intervals],
        "totals": checkpoint.totals.values(),
    }
