"""Headrace in Lightning: a data module, and a callback that ends steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from protos.errors import ConfigError
from trainer_client.batches import Batch
from trainer_client.session import Session
from trainer_client.taken import num_micro_batches


class HeadraceData(pl.LightningDataModule):
    """The session's batches; its state goes into Lightning's checkpoints and comes from there."""

    def __init__(self, session: Session, micro_batch: int) -> None:
        super().__init__()
        self.session = session
        self._micro_batch = micro_batch

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step has: what `accumulate_grad_batches` must be."""
        return num_micro_batches(
            global_sequences=self.session.spec.global_sequences,
            world_size=self.session.world_size,
            micro_batch=self._micro_batch,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the session's micro-batches."""
        assert self.trainer is not None
        return self.session.loader(self._micro_batch, self.trainer.strategy.root_device)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave the session's batches as they are: they are on the device already."""
        if isinstance(batch, Batch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return what `training_step` should: Lightning divides it by the micro-batches."""
        return self.session.loss(logits, batch) * self.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the session's state."""
        return self.session.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Join anew from a checkpoint's state."""
        self.session.load_state_dict(state_dict)


class HeadraceCallback(pl.Callback):
    """Watches the model, follows its batches and ends steps."""

    def __init__(self, data: HeadraceData) -> None:
        self._data = data

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the model, which the strategy has wrapped by now.

        Raises:
            ConfigError: the Trainer's steps are not the run's.
        """
        needed = self._data.micro_batches
        if trainer.accumulate_grad_batches != needed:
            raise ConfigError(
                f"a step of the run has {needed} micro-batches on each rank: set "
                f"accumulate_grad_batches={needed}, got {trainer.accumulate_grad_batches}"
            )
        self._data.session.probe(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Say which batch is trained: Lightning has fetched the next one already."""
        self._data.session.use(batch)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Send the step's report after its last micro-batch."""
        if batch.last_of_step:
            self._data.session.end_step()
