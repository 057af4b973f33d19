"""The training loss, and its sums per domain, which stay on the device."""

from __future__ import annotations

import torch
from torch.nn import functional

from trainer_client.batches import Batch
from trainer_client.device_copy import HostCopy

_IGNORED = -100


def token_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return [sequences, sequence_length] cross entropies in nats; 0 where the label is padding."""
    labels = batch.labels.masked_fill(~batch.loss_mask, _IGNORED)
    losses = functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return losses.view_as(labels)


class DomainLosses:
    """Sums of loss and counts of labels per domain over one step; no synchronisation anywhere."""

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._sums: torch.Tensor | None = None

    def add(self, losses: torch.Tensor, batch: Batch) -> None:
        """Count a micro-batch's per-token losses, zero where they do not count."""
        domain_ids, counted = batch.domain_ids, batch.loss_mask.double()
        summed = losses.detach().double()
        if domain_ids.ndim == 1:
            rows = torch.stack((summed.sum(dim=1), counted.sum(dim=1)), dim=1)
        else:
            # A token of domain -1 counts nowhere, like padding.
            known = domain_ids.flatten() >= 0
            rows = torch.stack((summed.flatten(), counted.flatten()), dim=1) * known[:, None]
            domain_ids = domain_ids.flatten().clamp_min(0)
        if self._sums is None:
            shape = (self._num_domains, 2)
            self._sums = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        self._sums.index_add_(0, domain_ids, rows)

    def finish(self) -> HostCopy | None:
        """Return [domains, 2] sums and counts, and begin anew; None: nothing was counted."""
        sums, self._sums = self._sums, None
        return None if sums is None else HostCopy(sums)

    def forget(self) -> None:
        """Drop what was counted of a step that is begun again."""
        self._sums = None
