"""Headrace under Megatron-LM's `--dataloader-type external`.

Megatron passes what `train_valid_test_datasets_provider` returns through as iterators and reads
them on tensor-parallel rank 0 only; its own broadcast gives the peers their rows. Data-parallel
rank and size are Megatron's, not torchrun's:

    session = trainer_client.connect(
        address,
        rank=mpu.get_data_parallel_rank(),
        world_size=mpu.get_data_parallel_world_size(),
    )
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trainer_client.batches import Batch
from trainer_client.integrations.follower import Follower


def external_iterator(follower: Follower) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches as Megatron's `get_batch` reads them.

    `tokens`, `labels` and `position_ids` are [sequences, sequence_length] int64, `loss_mask` is
    the same in float32. There is no `attention_mask`: pass
    --no-create-attention-mask-in-dataloader.
    """
    for batch in follower:
        length = batch.tokens.shape[1]
        positions = torch.arange(length, device=batch.tokens.device)
        yield {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "loss_mask": batch.loss_mask.float(),
            "position_ids": positions.expand_as(batch.tokens),
        }


def losses_of_output(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return per-token losses of a Megatron GPTModel, which gives them where it gets labels."""
    losses = output.detach()
    if losses.shape != batch.labels.shape:
        losses = losses.transpose(0, 1)
    return losses.float() * batch.loss_mask
