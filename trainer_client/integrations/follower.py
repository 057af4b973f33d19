"""For loops that hand out tensors only: which batch the model sees is told by the order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trainer_client.batches import Batch
from trainer_client.loss import token_losses
from trainer_client.session import Session

LossesOf = Callable[[Any, Batch], torch.Tensor]


def losses_of_logits(output: Any, batch: Batch) -> torch.Tensor:
    """Return per-token losses of a model that gives logits, or has them in `.logits`."""
    logits = getattr(output, "logits", output)
    return token_losses(logits.detach(), batch)


class Follower:
    """Yields a session's batches and follows the model's training passes through them.

    The model must see the micro-batches in the order in which they were taken, each once: pipeline
    schedules that interleave micro-batches are beyond it.
    """

    def __init__(
        self,
        session: Session,
        *,
        micro_batch: int,
        device: torch.device | str | None = None,
        losses_of: LossesOf = losses_of_logits,
    ) -> None:
        self.session = session
        self._micro_batch = micro_batch
        self._device = device
        self._losses_of = losses_of
        self._taken: deque[Batch] = deque()
        self._current: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, which may run ahead of the model."""
        self._taken.clear()
        for batch in self.session.batches(self._micro_batch, self._device, ahead=True):
            self._taken.append(batch)
            yield batch

    def attach(self, model: nn.Module) -> None:
        """Follow a model; call it once, after the model is wrapped and before torch.compile."""
        self.session.probe(model)
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, _: Any) -> None:
        if model.training and torch.is_grad_enabled() and self._taken:
            self._current = self._taken.popleft()
            self.session.use(self._current)

    def _after(self, _: nn.Module, inputs: Any, output: Any) -> None:
        batch, self._current = self._current, None
        if batch is not None:
            with torch.no_grad():
                self.session.record_losses(self._losses_of(output, batch), batch)
