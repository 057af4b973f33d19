"""Norms of some weights, and estimates of how far each step moves them, without copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer_client.device_copy import HostCopy
from trainer_client.watch import dtensor_type

_SKETCH_SIZE = 32


class WeightNorms:
    """Watches the weights of a few layers; repeated layers are measured once.

    The change of a weight W is estimated from A^T W B with fixed random A and B: sketches are
    linear, so the difference of two steps' sketches is the sketch of the change, and its squared
    norm is an unbiased estimate of the change's. Of a weight that is spread over ranks (a DTensor)
    each rank sketches its part, and the parts are added up over the trainer's own groups.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, seed: int) -> None:
        self._layers = list(dict.fromkeys(layers))
        positions = torch.tensor([self._layers.index(layer) for layer in layers])
        # On the device from the start: to bring it there in a step would make that step wait.
        self._positions = positions.to(layers[0].weight.device)
        self._projections = [_projections(layer, seed=seed) for layer in self._layers]
        self._before: torch.Tensor | None = None

    @torch.no_grad()
    def before_first_step(self) -> None:
        """Take the sketches that the first step's change is measured from; once is enough."""
        if self._before is None:
            self._before = self._measure()[:, 1:]

    @torch.no_grad()
    def after_step(self) -> HostCopy:
        """Return [2, norm layers]: norms of the weights, and of their change since the last call.

        A change is NaN where nothing came before.
        """
        measured = self._measure()
        squares, after = measured[:, 0], measured[:, 1:]
        before = after * torch.nan if self._before is None else self._before
        self._before = after
        norms = torch.stack((squares.sqrt(), (after - before).norm(dim=1)))
        return HostCopy(norms[:, self._positions])

    def _measure(self) -> torch.Tensor:
        """Return [layers, 1 + sketch]: squared norm and sketch of each weight."""
        rows = []
        for layer, (left, right) in zip(self._layers, self._projections, strict=True):
            weight = local_part(layer.weight.detach()).float()
            square = torch.linalg.vector_norm(weight).square()
            rows.append(torch.cat((square[None], (left.T @ weight @ right).flatten())))
        measured = torch.stack(rows)
        spread: dict[tuple[Any, ...], list[int]] = {}
        for index, layer in enumerate(self._layers):
            spread.setdefault(_groups(layer.weight), []).append(index)
        for groups, indices in spread.items():
            for group in groups:
                parts = measured[indices]
                dist.all_reduce(parts, group=group)
                measured[indices] = parts
        return measured


def _projections(layer: nn.Linear, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((layer.out_features, _SKETCH_SIZE), (layer.in_features, _SKETCH_SIZE))
    left, right = (torch.randn(shape, generator=generator) * _SKETCH_SIZE**-0.5 for shape in shapes)
    rows, columns = _extent(layer.weight)
    device = layer.weight.device
    return left[rows].to(device), right[columns].to(device)


def _is_spread(tensor: torch.Tensor) -> bool:
    dtensor = dtensor_type()
    return dtensor is not None and isinstance(tensor, dtensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if _is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _extent(weight: Any) -> tuple[slice, slice]:
    """Return which rows and columns of a weight this rank holds."""
    if not _is_spread(weight):
        return slice(None), slice(None)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    rows, columns = (slice(first, first + size) for first, size in zip(offset, shape, strict=True))
    return rows, columns


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
