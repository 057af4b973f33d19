"""From a delivered step to the micro-batches that the trainer sees, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from protos.spec import BEST_FIT, RunSpec
from protos.types import Step
from trainer_client.documents import Documents, StepDocuments, find_documents, label_mask

if TYPE_CHECKING:
    from trainer_client.delivered import DeliveredStep


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """A micro-batch: some of this rank's sequences of one step."""

    tokens: torch.Tensor
    """[sequences, sequence_length] int64: the model's input"""

    labels: torch.Tensor
    """[sequences, sequence_length] int64: the token that follows each of `tokens`"""

    loss_mask: torch.Tensor
    """[sequences, sequence_length] bool: False where the label is padding, and with best-fit
    packing where it is another document's first token"""

    domain_ids: torch.Tensor
    """[sequences] int64: positions in the run's domains. Probe and losses take [sequences, tokens]
    as well, where rows hold several domains; -1 there is of no domain."""

    step: Step
    slots: range
    """Places in the step's global batch; empty for a filler (see `split`)."""

    first_of_step: bool
    last_of_step: bool
    plan_version: int
    degraded: bool
    """Composed with the last plan, because the controller had not decided in time."""

    documents: Documents | None = None
    """None: `Session.batches` was not asked for them."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StagedStep:
    """A delivered step whose arrays are on the trainer's device, or on their way there."""

    delivered: DeliveredStep
    tokens: torch.Tensor | None
    """[sequences, sequence_length + 1] int64; None: on the CPU they are widened batch by batch."""

    loss_mask: torch.Tensor
    domain_ids: torch.Tensor
    documents: StepDocuments | None
    """None: not asked for."""

    copied: torch.cuda.Event | None
    """None: nothing to wait for."""

    def tensors(self) -> list[torch.Tensor]:
        """Return all that lies on the device."""
        tokens = [] if self.tokens is None else [self.tokens]
        documents = [] if self.documents is None else self.documents.tensors()
        return [*tokens, self.loss_mask, self.domain_ids, *documents]


class Deliveries(Protocol):
    """Where a trainer's steps come from; `Feed` streams them from the loader workers."""

    def has(self, step: Step) -> bool:
        """Tell whether `take` would not wait."""

    def take(self, step: Step) -> DeliveredStep:
        """Wait for a step and return it; each step is taken once, in order."""


class Stager:
    """Brings steps to the device; on CUDA the next step is copied while this one computes."""

    def __init__(
        self, feed: Deliveries, device: torch.device, *, spec: RunSpec, documents: bool
    ) -> None:
        self._feed = feed
        self._device = device
        self._spec = spec
        self._documents = documents
        self._ahead: StagedStep | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def check_documents(self, documents: bool) -> None:
        """Refuse to give documents that were not asked for from the start, or the reverse."""
        if documents != self._documents:
            raise ValueError(
                f"batches() was first called with documents={self._documents}, now with "
                f"documents={documents}: call it alike, or connect() anew"
            )

    def get(self, step: Step) -> StagedStep:
        """Return a step, waiting for it if it is not here yet."""
        ahead, self._ahead = self._ahead, None
        return ahead if ahead is not None else self._stage(self._feed.take(step))

    def look_ahead(self, step: Step) -> None:
        """Begin to copy a step if it is here already; never waits."""
        if self._stream is not None and self._ahead is None and self._feed.has(step):
            self._ahead = self._stage(self._feed.take(step))

    def _stage(self, delivered: DeliveredStep) -> StagedStep:
        staged = StagedStep(
            delivered=delivered,
            tokens=None,
            loss_mask=_loss_mask(delivered, self._spec),
            domain_ids=torch.from_numpy(delivered.domain_ids.astype(np.int64)),
            documents=self._find_documents(delivered),
            copied=None,
        )
        if self._device.type == "cpu":
            return staged
        if self._stream is None:
            return self._moved(staged)
        with torch.cuda.stream(self._stream):
            return replace(self._moved(staged), copied=self._stream.record_event())

    def _find_documents(self, delivered: DeliveredStep) -> StepDocuments | None:
        if not self._documents or delivered.documents is None:
            return None
        return find_documents(
            delivered.documents, delivered.num_tokens, sequence_length=self._spec.sequence_length
        )

    def _moved(self, staged: StagedStep) -> StagedStep:
        return replace(
            staged,
            tokens=self._move(torch.from_numpy(staged.delivered.tokens.astype(np.int64))),
            loss_mask=self._move(staged.loss_mask),
            domain_ids=self._move(staged.domain_ids),
            documents=staged.documents.moved(self._move) if staged.documents else None,
        )

    def _move(self, array: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return array.to(self._device)
        return array.pin_memory().to(self._device, non_blocking=True)


def _loss_mask(delivered: DeliveredStep, spec: RunSpec) -> torch.Tensor:
    if spec.packing == BEST_FIT and delivered.documents is not None:
        return label_mask(
            delivered.documents, delivered.num_tokens, sequence_length=spec.sequence_length
        )
    num_sequences, width = delivered.tokens.shape
    # Only a window's last sequence is padded, so nearly every step is full.
    if np.all(delivered.num_tokens == width):
        return torch.ones((num_sequences, width - 1), dtype=torch.bool)
    num_tokens = torch.from_numpy(delivered.num_tokens.astype(np.int64))
    return torch.arange(1, width)[None, :] < num_tokens[:, None]


def _inputs_and_labels(staged: StagedStep, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    if staged.tokens is not None:
        tokens = staged.tokens[rows]
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    # Widened from the wire's two bytes straight to where they are used, one copy each.
    narrow = staged.delivered.tokens[rows]
    return (
        torch.from_numpy(narrow[:, :-1].astype(np.int64)),
        torch.from_numpy(narrow[:, 1:].astype(np.int64)),
    )


def arrive(staged: StagedStep) -> None:
    """Make the device's current stream wait for the copy of a step; the host does not wait."""
    if staged.copied is None:
        return
    current = torch.cuda.current_stream(staged.loss_mask.device)
    current.wait_event(staged.copied)
    for array in staged.tensors():
        array.record_stream(current)


def split(staged: StagedStep, *, micro_batch: int, most_sequences: int) -> Iterator[Batch]:
    """Yield the micro-batches of a step.

    All ranks yield equally many, else their collectives would not meet. Where a rank with one
    sequence fewer than others would yield fewer, its last micro-batch is a filler: a copy of its
    first sequence with nothing in `loss_mask`.

    Args:
        staged: the step.
        micro_batch: sequences in a micro-batch; the last may have fewer.
        most_sequences: what the rank with the most of them has in a step.
    """
    num_sequences = len(staged.delivered.tokens)
    num_batches = -(-most_sequences // micro_batch)
    for index in range(num_batches):
        first = index * micro_batch
        end = min(first + micro_batch, num_sequences)
        filler = first >= end
        rows = slice(0, 1) if filler else slice(first, end)
        documents = staged.documents.rows(rows.start, rows.stop) if staged.documents else None
        mask = staged.loss_mask[rows]
        tokens, labels = _inputs_and_labels(staged, rows)
        slots = staged.delivered.slots
        yield Batch(
            tokens=tokens,
            labels=labels,
            loss_mask=torch.zeros_like(mask) if filler else mask,
            domain_ids=staged.domain_ids[rows],
            step=staged.delivered.step,
            slots=slots[0:0] if filler else slots[first:end],
            first_of_step=index == 0,
            last_of_step=index == num_batches - 1,
            plan_version=staged.delivered.plan_version,
            degraded=staged.delivered.degraded,
            documents=documents,
        )
