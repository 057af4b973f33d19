"""The part of a session that keeps what a step's losses come to."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch

from protos.spec import RunSpec
from trainer_client.batches import Batch
from trainer_client.loss import DomainLosses, token_losses
from trainer_client.policy_inputs import PolicyInputs


class StepRecorder(abc.ABC):
    """Sums per domain over the micro-batches of a step; `Session` is one."""

    _losses: DomainLosses
    _inputs: PolicyInputs

    @property
    @abc.abstractmethod
    def spec(self) -> RunSpec:
        """What all processes of the run agree on."""

    @property
    @abc.abstractmethod
    def world_size(self) -> int:
        """How many data-parallel ranks there are."""

    def _begin_recording(self, spec: RunSpec) -> None:
        self._losses = DomainLosses(spec.num_domains)
        self._inputs = PolicyInputs(spec)

    def _forget_recorded(self) -> None:
        """Drop what was counted of a step that is begun again."""
        self._losses.forget()
        self._inputs.forget()

    def loss(
        self, logits: torch.Tensor, batch: Batch, *, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss to back-propagate, and keep its sums per domain.

        It is the cross entropy summed over the micro-batch's labels, times world_size /
        (global_sequences x sequence_length): a step's micro-batches add up, and the average that
        DDP takes over the ranks is the mean over the global batch, padding counted as 0.

        Args:
            logits: [sequences, sequence_length, vocabulary]
            batch: the micro-batch that they are for.
            reference: see `record_losses`.
        """
        losses = token_losses(logits, batch)
        self.record_losses(losses, batch, reference=reference)
        return losses.sum() * self._loss_scale()

    def record_losses(
        self, losses: torch.Tensor, batch: Batch, *, reference: torch.Tensor | None = None
    ) -> None:
        """Keep the sums per domain, for a trainer that computes its loss itself.

        Args:
            losses: [sequences, sequence_length] nats, 0 where `batch.loss_mask` is False.
            batch: the micro-batch that they are for.
            reference: a reference model's losses of the same tokens, in the same shape; needed if
                `spec.needs_reference`, as `doremi` does.
        """
        self._losses.add(losses, batch)
        if reference is not None:
            self._inputs.add_reference(losses, reference, batch)

    def validation_due(self, step: int) -> bool:
        """Say whether the policy needs an evaluation after the optimizer's step of `step`."""
        return self.spec.validation_due(step)

    def record_validation(self, losses: Mapping[str, float]) -> None:
        """Give the policy an evaluation on documents held out for it; one rank is enough.

        Where `validation_due` says so, after the optimizer's step and before `end_step`.

        Args:
            losses: each domain's mean loss in nats a token.

        Raises:
            ValueError: domains are missing or unknown, or a loss is no number.
        """
        self._inputs.take_validation(losses)

    def _loss_scale(self) -> float:
        return self.world_size / (self.spec.global_sequences * self.spec.sequence_length)
