"""The trainer's part of a trial: data composed on the spot, a model, its statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from deploy.compare.model import make_model
from deploy.compare.spec import TrainingSection
from loader_workers.composer import Composer
from loader_workers.source import WindowSource
from protos.planbook import PlanBook
from protos.spec import RunSpec
from protos.types import Cursors, Generation, Lane, Rank, Step, StepBatch, StepReport
from trainer_client.batches import Batch, Stager, split
from trainer_client.delivered import DeliveredStep, assemble
from trainer_client.loss import DomainLosses, token_losses
from trainer_client.probe import GradientProbe
from trainer_client.reporter import PendingReport

_BETAS = (0.9, 0.95)
_CPU = torch.device("cpu")


class ComposedSteps:
    """A run's global batches, composed when they are asked for, under the plans of a book."""

    def __init__(self, source: WindowSource, book: PlanBook, cursors: Cursors) -> None:
        self._spec = source.spec
        self._book = book
        self._composer = Composer(
            source, cursors, first_slot=0, end_slot=self._spec.global_sequences
        )

    def has(self, step: Step) -> bool:
        """Tell whether `take` would not wait."""
        return True

    def take(self, step: Step) -> DeliveredStep:
        """Compose a step; each is taken once, in order."""
        plan = self._book.plan_at(step)
        lanes = self._composer.compose(step, self._book.counts(step))
        batch = StepBatch(step=step, plan_version=plan.version, degraded=False, lanes=lanes)
        slots = range(self._spec.global_sequences)
        return assemble({lane.lane: (batch, lane) for lane in lanes}, slots, step=step)

    def close(self) -> None:
        """Give up what is being opened ahead; idempotent."""
        self._composer.close()


def first_cursors(spec: RunSpec) -> Cursors:
    """Return every lane's place before the first step."""
    zeros = np.zeros((spec.num_domains, 3), np.uint32)
    return {Lane(lane): zeros for lane in range(spec.lanes)}


class Learner:
    """A model that is trained step by step, on one thread, as a single rank would train it."""

    def __init__(self, spec: RunSpec, training: TrainingSection, *, model: str, seed: int) -> None:
        """Make the model: the same seed, the same weights, whatever the policy."""
        self._spec = spec
        self._training = training
        self.model = make_model(
            model, vocab_size=spec.vocab_size, sequence_length=spec.sequence_length, seed=seed
        )
        decayed = [each for each in self.model.parameters() if each.ndim >= 2]
        others = [each for each in self.model.parameters() if each.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": training.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=training.lr,
            betas=_BETAS,
            fused=True,
        )
        self._probe: GradientProbe | None = None
        if spec.probe is not None:
            self._probe = GradientProbe(self.model, spec=spec.probe, num_domains=spec.num_domains)
        self._losses = DomainLosses(spec.num_domains)
        self._scale = 1 / (spec.global_sequences * spec.sequence_length)

    def train(self, deliveries: ComposedSteps, step: Step) -> tuple[StepReport, DeliveredStep]:
        """Make one optimizer step; return what the rank reports of it, and what it trained on."""
        began = time.perf_counter()
        staged = Stager(deliveries, _CPU, spec=self._spec, documents=False).get(step)
        data_wait_s = time.perf_counter() - began
        micro_batch = self._training.micro_batch
        for batch in split(
            staged, micro_batch=micro_batch, most_sequences=self._spec.global_sequences
        ):
            self._backward(batch)
        self._update(step)
        probe = self._probe.finish(step, loss_scale=self._scale) if self._probe else None
        delivered = staged.delivered
        num_domains = self._spec.num_domains
        report = StepReport(
            generation=Generation(1),
            rank=Rank(0),
            step=step,
            plan_version=delivered.plan_version,
            sequences=np.bincount(delivered.domain_ids, minlength=num_domains),
            tokens=np.zeros(num_domains, np.int64),
            loss_sum=np.zeros(num_domains),
            step_s=time.perf_counter() - began,
            data_wait_s=data_wait_s,
            cursors=delivered.cursors,
        )
        pending = PendingReport(report=report, losses=self._losses.finish(), probe=probe)
        resolved, left_out = pending.resolve(timeout_s=0.0)
        if left_out:
            raise FloatingPointError(f"step {step}: the report lacks {'; '.join(left_out)}")
        return resolved, delivered

    def _backward(self, batch: Batch) -> None:
        if self._probe is not None:
            self._probe.begin(batch)
        losses = token_losses(self.model(batch.tokens), batch)
        self._losses.add(losses, batch)
        (losses.sum() * self._scale).backward()  # type: ignore[no-untyped-call]

    def _update(self, step: Step) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._training.clip_norm)
        rising = min((step + 1) / max(self._training.warmup_steps, 1), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.lr * rising
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer state."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Take the probe's hooks off; idempotent."""
        if self._probe is not None:
            self._probe.close()


@torch.no_grad()
def held_out_loss(
    model: nn.Module, tokens: NDArray[np.uint16], *, micro_batch: int
) -> NDArray[np.float64]:
    """Return the [domains] mean loss in nats a token.

    Args:
        model: gives logits for tokens.
        tokens: [domains, sequences, sequence_length + 1]
        micro_batch: sequences at a time.
    """
    means = []
    for sequences in torch.from_numpy(tokens.astype(np.int64)):
        total = sum(_summed_loss(model, part) for part in sequences.split(micro_batch))
        means.append(total / (sequences.shape[0] * (sequences.shape[1] - 1)))
    return np.asarray(means, dtype=np.float64)


def _summed_loss(model: nn.Module, sequences: torch.Tensor) -> float:
    logits = model(sequences[:, :-1])
    labels = sequences[:, 1:].flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    return float(losses.double().sum())
