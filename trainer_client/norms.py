"""Norms of some weights, and how far each step moves them, from a sample of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer_client.device_copy import HostCopy
from trainer_client.watch import dtensor_type

_ROWS = 64
"""Rows of a weight that are looked at. To read all of nine layers at every step took a Pythia-160M
0.5% of a step of 512 tokens on a CPU; the rows' norms differ by so little that 64 of them give the
whole's to about two percent, and the sample stays the same, so that trends are exact."""


class WeightNorms:
    """Watches the weights of a few layers; repeated layers are measured once.

    Squared norms of some rows, chosen at random once, are scaled up to all rows: unbiased, and
    exact for layers with no more rows than that. Of a weight that is spread over ranks (a DTensor)
    each rank measures its part, and the parts are added up over the trainer's own groups.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, seed: int) -> None:
        self._layers = list(dict.fromkeys(layers))
        positions = torch.tensor([self._layers.index(layer) for layer in layers])
        # On the device from the start: to bring it there in a step would make that step wait.
        self._positions = positions.to(layers[0].weight.device)
        self._rows = [_sample(layer, seed=seed) for layer in self._layers]
        scales = [layer.out_features / min(layer.out_features, _ROWS) for layer in self._layers]
        self._scales = torch.tensor(scales).to(layers[0].weight.device)
        self._before: list[torch.Tensor] | None = None
        self._spread: dict[tuple[Any, ...], list[int]] = {}
        for index, layer in enumerate(self._layers):
            self._spread.setdefault(_groups(layer.weight), []).append(index)

    @torch.no_grad()
    def before_first_step(self) -> None:
        """Take the rows that the first step's change is measured from; once is enough."""
        if self._before is None:
            self._before = self._sampled()

    @torch.no_grad()
    def after_step(self) -> HostCopy:
        """Return [2, norm layers]: norms of the weights, and of their change since the last call.

        A change is NaN where nothing came before.
        """
        after = self._sampled()
        before = self._before if self._before is not None else [one * torch.nan for one in after]
        self._before = after
        squares = torch.stack(
            [
                torch.stack((_square(new), _square(new - old)))
                for new, old in zip(after, before, strict=True)
            ]
        )
        for groups, indices in self._spread.items():
            for group in groups:
                parts = squares[indices]
                dist.all_reduce(parts, group=group)
                squares[indices] = parts
        norms = (squares * self._scales[:, None]).sqrt().T
        return HostCopy(norms[:, self._positions])

    def _sampled(self) -> list[torch.Tensor]:
        return [
            local_part(layer.weight.detach())[rows].float()
            for layer, rows in zip(self._layers, self._rows, strict=True)
        ]


def _square(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values)
    return norm.square()


def _sample(layer: nn.Linear, *, seed: int) -> torch.Tensor:
    """Return which of the rows that this rank holds are in the sample, as local positions."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(layer.out_features, generator=generator)[:_ROWS].sort().values
    first, end = _extent(layer.weight)
    return (chosen[(first <= chosen) & (chosen < end)] - first).to(layer.weight.device)


def _is_spread(tensor: torch.Tensor) -> bool:
    dtensor = dtensor_type()
    return dtensor is not None and isinstance(tensor, dtensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if _is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _extent(weight: Any) -> tuple[int, int]:
    """Return the first row of a weight that this rank holds, and the end of its rows."""
    if not _is_spread(weight):
        return 0, weight.shape[0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return offset[0], offset[0] + shape[0]


def _groups(weight: Any) -> tuple[Any, ...]:
    """Return the process groups over which a weight's parts add up to the whole."""
    if not _is_spread(weight):
        return ()
    mesh = weight.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(weight.placements)
        if not placement.is_replicate()
    )
