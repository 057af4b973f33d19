"""What workers are asked before they are told plans: how far have you gone alone?"""

from __future__ import annotations

from protos.errors import InvalidMessage
from protos.spec import RunSpec
from protos.types import WorkerBeat

MAX_STEPS_BEYOND_END = 100_000
"""How far beyond a run's last step a worker may have composed, or be asked to."""


class Questions:
    """The newest question to each worker that answers, and what it was told of since."""

    def __init__(self) -> None:
        self._count = 0
        self._asked: dict[str, int] = {}
        self._told_through: dict[str, int] = {}

    def ask(self, worker_id: str) -> int:
        """Return the number of a question that is about to be asked."""
        self._count += 1
        self._asked[worker_id] = self._count
        self._told_through[worker_id] = -1
        return self._count

    def ask_anew(self, worker_id: str) -> None:
        """Have what a worker said last count as no answer, until it is asked again."""
        if worker_id in self._asked:
            self._count += 1
            self._asked[worker_id] = self._count

    def ask_all_anew(self) -> None:
        """Have nothing that was said count as an answer."""
        for worker_id in self._asked:
            self.ask_anew(worker_id)

    def were_put_to(self, worker_id: str) -> bool:
        """Say whether a worker answers at all: those of before it was asked do not."""
        return worker_id in self._asked

    def has_answered(self, beat: WorkerBeat, *, epoch: int) -> bool:
        """Say whether a beat was sent after its worker had heard the question of controller."""
        newest = self._asked.get(beat.worker_id, 0)
        return beat.heard_epoch == epoch and beat.answered >= newest

    def telling(self, worker_id: str, *, sealed_through: int) -> None:
        """Note that a worker is about to be told of a seal."""
        self._told_through[worker_id] = sealed_through

    def told_through(self) -> int:
        """Return the last seal that a worker was told of since it was asked; -1: none."""
        return max(self._told_through.values(), default=-1)


def check_steps(beat: WorkerBeat, spec: RunSpec) -> None:
    """Hold the steps and lanes that a worker names against the run.

    Raises:
        InvalidMessage: they cannot be right.
    """
    last, who = spec.num_steps + MAX_STEPS_BEYOND_END, f"worker {beat.worker_id[:100]!r}"
    for name in ("needed_step", "composed_through", "sealed_through"):
        if not -1 <= getattr(beat, name) <= last:
            raise InvalidMessage(
                f"{who} says {name} = {getattr(beat, name)}, the run has {spec.num_steps} steps"
            )
    for each in beat.alone:
        if each.last_step > last or max(each.lanes) >= spec.lanes:
            raise InvalidMessage(
                f"{who} says that it composed steps {each.first_step}..{each.last_step} of lanes "
                f"{list(each.lanes)[:10]} alone; the run has {spec.num_steps} steps and "
                f"{spec.lanes} lanes"
            )
