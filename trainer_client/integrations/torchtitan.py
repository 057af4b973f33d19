"""Headrace as a torchtitan data loader.

torchtitan 0.3 has the base class in `components.dataloader`, later versions in
`components.data.loader`; this subclasses whichever is there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from protos.errors import ConfigError
from trainer_client.integrations.follower import Follower, LossesOf, losses_of_logits
from trainer_client.session import Session

PATHS = ("torchtitan.components.data.loader", "torchtitan.components.dataloader")
IGNORED = -100
"""torchtitan's IGNORE_INDEX: such labels count in no loss."""


def base_module() -> Any:
    """Return torchtitan's module that has BaseDataLoader.

    Raises:
        ConfigError: there is none.
    """
    for path in PATHS:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            continue
        if hasattr(module, "BaseDataLoader"):
            return module
    raise ConfigError(
        f"torchtitan's BaseDataLoader is at none of {', '.join(PATHS)}: install torchtitan"
    )


_module = base_module()
DataloaderExhaustedError: type[Exception] = _module.DataloaderExhaustedError


class HeadraceDataLoader(_module.BaseDataLoader):  # type: ignore[name-defined,misc]
    """Yields ({"input": tokens}, labels); `attach` the model, `end_step` after the optimizer's."""

    def __init__(
        self,
        session: Session,
        *,
        micro_batch: int,
        device: torch.device | str | None = None,
        losses_of: LossesOf = losses_of_logits,
    ) -> None:
        self.session = session
        self._follower = Follower(
            session, micro_batch=micro_batch, device=device, losses_of=losses_of
        )
        self.attach = self._follower.attach
        self.end_step = session.end_step

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield micro-batches.

        Raises:
            DataloaderExhaustedError: the run's last step was yielded.
        """
        for batch in self._follower:
            yield {"input": batch.tokens}, batch.labels.masked_fill(~batch.loss_mask, IGNORED)
        raise DataloaderExhaustedError(
            f"the run {self.session.spec.run_id} has {self.session.spec.num_steps} steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state under a key of its own, plain types only."""
        return {f"dp_rank_{self.session.rank}": self.session.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Join anew; any rank's state will do, and the number of ranks may differ."""
        if state_dict:
            own = state_dict.get(f"dp_rank_{self.session.rank}")
            self.session.load_state_dict(own or next(iter(state_dict.values())))

    def close(self) -> None:
        """End the session."""
        self.session.close()
