"""Norms of some weights, and estimates of how far each step moves them, without copies of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trainer_client.device_copy import HostCopy

_SKETCH_SIZE = 32


class WeightNorms:
    """Watches the weights of a few layers; repeated layers are measured once.

    The change of a weight W is estimated from A^T W B with fixed random A and B: sketches are
    linear, so the difference of two steps' sketches is the sketch of the change, and its squared
    norm is an unbiased estimate of the change's.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, seed: int) -> None:
        self._layers = list(dict.fromkeys(layers))
        positions = torch.tensor([self._layers.index(layer) for layer in layers])
        # On the device from the start: to bring it there in a step would make that step wait.
        self._positions = positions.to(layers[0].weight.device)
        self._projections = [_projections(layer, seed=seed) for layer in self._layers]
        self._before: list[torch.Tensor] | None = None

    @torch.no_grad()
    def before_first_step(self) -> None:
        """Take the sketches that the first step's change is measured from; once is enough."""
        if self._before is None:
            self._before = self._sketches()

    @torch.no_grad()
    def after_step(self) -> HostCopy:
        """Return [2, norm layers]: norms of the weights, and of their change since the last call.

        A change is NaN where nothing came before.
        """
        after = self._sketches()
        before = self._before if self._before is not None else [one * torch.nan for one in after]
        moved = torch.stack([(new - old).norm() for new, old in zip(after, before, strict=True)])
        norms = torch.stack([layer.weight.detach().float().norm() for layer in self._layers])
        self._before = after
        return HostCopy(torch.stack((norms, moved))[:, self._positions])

    def _sketches(self) -> list[torch.Tensor]:
        return [
            rows.T @ layer.weight.detach().float() @ columns
            for layer, (rows, columns) in zip(self._layers, self._projections, strict=True)
        ]


def _projections(layer: nn.Linear, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((layer.out_features, _SKETCH_SIZE), (layer.in_features, _SKETCH_SIZE))
    rows, columns = (
        (torch.randn(shape, generator=generator) * _SKETCH_SIZE**-0.5).to(layer.weight.device)
        for shape in shapes
    )
    return rows, columns
