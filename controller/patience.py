"""How long a decision waits for reports, and where it goes on if they do not come."""

from __future__ import annotations

from collections.abc import Callable

from controller.aggregate import Aggregator
from controller.state import RunState
from controller.workers import Workers
from protos.types import Step


class Patience:
    """Waits `grace_s` for the reports of a step of which others came, or that a rank needs."""

    def __init__(self, workers: Workers, *, grace_s: float, now: Callable[[], float]) -> None:
        self._workers = workers
        self._grace_s = grace_s
        self._now = now
        self._needed_since_s: float | None = None

    def begin_anew(self) -> None:
        """Forget how long a generation that has ended was waited for."""
        self._needed_since_s = None

    def is_over(self, group: Aggregator, state: RunState) -> bool:
        """Say whether the next step has been waited for long enough."""
        now = self._now()
        if self._needed(group, state) is None:
            self._needed_since_s = None
        elif self._needed_since_s is None:
            self._needed_since_s = now
        waits = (self._needed_since_s, group.waiting_since_s())
        return any(since is not None and now - since >= self._grace_s for since in waits)

    def end(self, group: Aggregator, state: RunState) -> Step:
        """Return the step before which all are given up; patience is over, or all have passed."""
        ends = [group.first_reported()]
        needed = self._needed(group, state)
        if needed is not None:
            ends.append(Step(needed - state.spec.lag + 1))
        return min(step for step in ends if step is not None)

    def _needed(self, group: Aggregator, state: RunState) -> int | None:
        return self._workers.needed_beyond(state.sealed_through, group.generation)
