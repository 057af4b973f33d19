"""The steps that a trainer has taken and not yet ended: one, or several if a framework looks ahead.

A framework that fetches the next micro-batch before it trains this one (Accelerate, Lightning,
Hugging Face's Trainer) makes the iterator run ahead; what is ended, and what a checkpoint holds,
follows `end_step` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protos.errors import ConfigError
from protos.types import Step
from trainer_client.batches import Batch, StagedStep, Stager, arrive, split
from trainer_client.delivery_log import DeliveryLog


@dataclass(kw_only=True, eq=False, slots=True)
class TakenStep:
    """A step that is here."""

    staged: StagedStep
    data_wait_s: float
    all_yielded: bool = False


class TakenSteps:
    """Takes steps from the stager and yields their micro-batches; each step is taken once."""

    def __init__(
        self,
        stager: Stager,
        *,
        num_steps: int,
        most_sequences: int,
        log: DeliveryLog | None,
        check_process: Callable[[], None],
    ) -> None:
        """`check_process` raises where the stager's threads are not: in a fork."""
        self.stager = stager
        self._num_steps = num_steps
        self._most_sequences = most_sequences
        self._log = log
        self._check_process = check_process
        self._taken: dict[Step, TakenStep] = {}
        self.data_wait_s = 0.0

    def batches(self, first_step: Step, micro_batch: int) -> Iterator[Batch]:
        """Yield the micro-batches from a step on that has not been ended."""
        for number in range(first_step, self._num_steps):
            step = Step(number)
            self._check_process()
            taken = self._take(step)
            for batch in split(
                taken.staged, micro_batch=micro_batch, most_sequences=self._most_sequences
            ):
                taken.all_yielded = batch.last_of_step
                if batch.last_of_step and step + 1 < self._num_steps:
                    self.stager.look_ahead(Step(step + 1))
                yield batch

    def _take(self, step: Step) -> TakenStep:
        if step not in self._taken:
            began = time.perf_counter()
            staged = self.stager.get(step)
            waited_s = time.perf_counter() - began
            self.data_wait_s += waited_s
            arrive(staged)
            if self._log is not None:
                self._log.write(staged.delivered)
            self._taken[step] = TakenStep(staged=staged, data_wait_s=waited_s)
        return self._taken[step]

    def open(self, step: Step) -> bool:
        """Tell whether a step is taken and not ended."""
        return step in self._taken

    def end(self, step: Step) -> TakenStep | None:
        """Remove and return a step all of whose micro-batches were yielded; None: it is not one."""
        taken = self._taken.get(step)
        if taken is None or not taken.all_yielded:
            return None
        return self._taken.pop(step)


def num_micro_batches(*, global_sequences: int, world_size: int, micro_batch: int) -> int:
    """Return how many micro-batches every rank has in a step.

    Raises:
        ConfigError: a micro-batch must hold something.
    """
    if micro_batch < 1:
        raise ConfigError(f"micro_batch must be at least 1, got {micro_batch}")
    return -(-most_sequences(global_sequences, world_size) // micro_batch)


def most_sequences(global_sequences: int, world_size: int) -> int:
    """Return what the rank with the most sequences has of a step."""
    return -(-global_sequences // world_size)
