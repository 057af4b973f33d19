"""A session's batches as a torch DataLoader, for frameworks that insist on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from protos.errors import ConfigError
from trainer_client.batches import Batch
from trainer_client.taken import num_micro_batches

if TYPE_CHECKING:
    from trainer_client.session import Session


class SessionDataset(IterableDataset[Batch]):
    """The batches of a session, in the training process; its length is that of the whole run."""

    def __init__(
        self,
        session: Session,
        micro_batch: int,
        device: torch.device | str | None,
        *,
        documents: bool,
    ) -> None:
        super().__init__()
        self._session = session
        self._micro_batch = micro_batch
        self._device = device
        self._documents = documents

    def __iter__(self) -> Iterator[Batch]:
        """Yield from the first step that was not ended; may run ahead of what is trained."""
        if get_worker_info() is not None:
            raise ConfigError(
                "Headrace's batches come over streams of the training process and cannot be read "
                "in DataLoader workers: set num_workers=0, the session prefetches by itself"
            )
        return self._session.batches(
            self._micro_batch, self._device, documents=self._documents, ahead=True
        )

    def __len__(self) -> int:
        """Return the number of micro-batches of the run's steps."""
        spec = self._session.spec
        return spec.num_steps * num_micro_batches(
            global_sequences=spec.global_sequences,
            world_size=self._session.world_size,
            micro_batch=self._micro_batch,
        )


def make_loader(
    session: Session,
    micro_batch: int,
    device: torch.device | str | None,
    *,
    documents: bool = False,
) -> DataLoader[Batch]:
    """Return a loader that passes the session's batches on as they are."""
    return DataLoader(
        SessionDataset(session, micro_batch, device, documents=documents),
        batch_size=None,
        num_workers=0,
    )
