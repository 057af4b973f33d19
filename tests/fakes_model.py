"""A small causal model and batches for it, to hold the probe against plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from protos.types import Step
from trainer_client import Batch

WIDTH = 12
VOCABULARY = 17


class Block(nn.Module):
    """Mixes over time by a running mean, then a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        mixed = hidden.cumsum(dim=1) / steps[None, :, None]
        return hidden + self.down(torch.tanh(self.up(mixed)))  # type: ignore[no-any-return]


class TinyModel(nn.Module):
    """Logits for tokens; can checkpoint its blocks, or run them on flattened hidden states."""

    def __init__(self, *, num_blocks: int = 3, checkpointing: str = "", flat_head: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self._checkpointing = checkpointing
        self._flat_head = flat_head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self._checkpointing:
                reentrant = self._checkpointing == "reentrant"
                hidden = checkpoint(block, hidden, use_reentrant=reentrant)
            else:
                hidden = block(hidden)
        if self._flat_head:
            return self.head(hidden.flatten(0, 1)).view(*tokens.shape, -1)  # type: ignore[no-any-return]
        return self.head(hidden)  # type: ignore[no-any-return]


def make_batches(
    domain_ids: Sequence[Sequence[int]], *, length: int = 6, seed: int = 0, step: int = 0
) -> list[Batch]:
    """Return the micro-batches of a step, with the domains given and some padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index, ids in enumerate(domain_ids):
        tokens = torch.randint(VOCABULARY, (len(ids), length + 1), generator=generator)
        ends = torch.randint(2, length + 1, (len(ids), 1), generator=generator)
        batches.append(
            Batch(
                tokens=tokens[:, :-1],
                labels=tokens[:, 1:],
                loss_mask=torch.arange(length)[None, :] < ends,
                domain_ids=torch.tensor(ids),
                step=Step(step),
                slots=range(0),
                first_of_step=index == 0,
                last_of_step=index == len(domain_ids) - 1,
                plan_version=0,
                degraded=False,
            )
        )
    return batches


def summed_loss(model: nn.Module, batch: Batch, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cross entropy summed over the labels of some sequences."""
    losses = functional.cross_entropy(
        model(batch.tokens).transpose(1, 2), batch.labels, reduction="none"
    )
    kept = losses * batch.loss_mask
    return kept.sum() if rows is None else kept[rows].sum()


def domain_gradients(
    model: nn.Module, batches: Sequence[Batch], weights: Sequence[nn.Parameter], num_domains: int
) -> torch.Tensor:
    """Return [domains, numbers]: gradients of each domain's summed loss, by autograd alone."""
    rows = []
    for domain in range(num_domains):
        loss = torch.zeros(())
        for batch in batches:
            loss = loss + summed_loss(model, batch, batch.domain_ids == domain)
        found = torch.autograd.grad(loss, weights)
        rows.append(torch.cat([one.flatten() for one in found]))
    return torch.stack(rows)
