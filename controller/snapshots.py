"""Where the policy's states are kept: a few files, named by the step after which each was saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controller.policy import artefact
from controller.policy.base import PolicyState
from protos.errors import LedgerError
from protos.types import Step

NUM_KEPT = 3
"""Older snapshots are removed: what was observed since a newer one is in the ledger."""


_APART_S = 1.0
"""Time between snapshots of a policy that does not learn, however short the steps are."""


class Snapshots:
    """The folder of a run's snapshots."""

    def __init__(self, folder: Path, *, origin: Mapping[str, Any]) -> None:
        """Tell where they lie, and what each says of the run that it comes from (JSON values)."""
        self._folder = folder
        self._origin = dict(origin)

    def path_after(self, step: int) -> Path:
        """Return where the state after `step` belongs; -1: before the first step."""
        return self._folder / f"after-{step + 1:09d}-steps.safetensors"

    def newest_first(self) -> list[tuple[int, Path]]:
        """Return what is kept: the step after which each was saved, and where."""
        kept = sorted(self._folder.glob("after-*-steps.safetensors"), reverse=True)
        return [(int(path.name.split("-")[1]) - 1, path) for path in kept]

    def write(self, state: PolicyState, step: int) -> Path:
        """Write the state after `step`; remove what is too old.

        Raises:
            LedgerError: it could not be written.
        """
        path = self.path_after(step)
        try:
            # A controller that was killed while it saved has left a part of a file.
            for part in self._folder.glob(".after-*.tmp"):
                part.unlink(missing_ok=True)
            artefact.save(state, path, origin={**self._origin, "steps": step + 1})
            kept = sorted(self._folder.glob("after-*-steps.safetensors"))
            for old in kept[:-NUM_KEPT]:
                if old != path:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise LedgerError(f"cannot save the policy's state to {path}: {error}") from error
        return path


class SavePace:
    """When the policy is saved: every so many steps, and seldom where there is little to save."""

    def __init__(self, every: int, *, now: Callable[[], float]) -> None:
        self._every = every
        self._now = now
        self._saved_at_s = -math.inf

    def ends_with(self, step: Step) -> bool:
        """Say whether the policy may be saved as it is after `step`."""
        return (step + 1) % self._every == 0

    def is_due(self, step: Step, *, learns: bool) -> bool:
        """Say whether to save it after `step`."""
        now = self._now()
        if not self.ends_with(step) or (not learns and now - self._saved_at_s < _APART_S):
            return False
        self._saved_at_s = now
        return True
