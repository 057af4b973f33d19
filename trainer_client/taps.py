"""What is watched of a layer when it is applied: whole, as a tensor-parallel part, or tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from protos.errors import ConfigError
from trainer_client.sketch import LayerSketch
from trainer_client.watch import Watched, by_sequence, check_shape, dtensor_type


class LinearTap:
    """Watches a linear layer, tensor-parallel or not.

    Where the layer's outputs (`ColwiseParallel`) or inputs (`RowwiseParallel`) are spread over
    ranks, each rank projects what it has with its own rows of P or Q, and the sketch is the sum
    over those ranks.
    """

    def __init__(self, sketch: LayerSketch, layer: nn.Linear, name: str) -> None:
        self._sketch = sketch
        self._name = name
        self._out_features = layer.out_features
        self._dtensor = dtensor_type()
        self.tensor_mesh: Any = None
        """The device mesh that the layer's states are spread over; None: they are whole."""

    def watch(
        self, inputs: tuple[Any, ...], output: torch.Tensor, domain_ids: torch.Tensor
    ) -> Watched:
        """Return what the layer adds, given its inputs and output.

        Raises:
            ConfigError: the states are not of this micro-batch, or spread in a way not known here.
        """
        hidden, in_projection = inputs[0], self._sketch.in_projection
        out_projection = self._sketch.out_projection
        if self._dtensor is not None and isinstance(output, self._dtensor):
            raise ConfigError(
                f"the gradient probe cannot watch layer {self._name}, whose output is a DTensor: "
                "leave use_local_output at True, or name other layers (probe.layers)"
            )
        if self._dtensor is not None and isinstance(hidden, self._dtensor):
            if in_projection is None or out_projection is None:
                raise ConfigError(
                    f"layer {self._name} is tensor-parallel, and probe.mode exact wants whole "
                    "gradients: set probe.mode to sketch, or name other layers"
                )
            hidden, rows, columns = self._parted(hidden, output)
            in_projection, out_projection = in_projection[rows], out_projection[columns]
        check_shape(output, domain_ids, self._name)
        kept = by_sequence(hidden.detach(), domain_ids)
        if in_projection is not None:
            kept = kept @ in_projection.to(kept.dtype)
        return Watched(self._sketch, kept, out_projection, kept_is_rows=False)

    def _parted(self, hidden: Any, output: torch.Tensor) -> tuple[torch.Tensor, slice, slice]:
        """Return this rank's part of the inputs, and which rows of Q and P belong to it."""
        mesh, (placement, *others) = hidden.device_mesh, hidden.placements
        local = hidden.to_local()
        whole = slice(None)
        last = hidden.ndim - 1
        if others or local.shape[:-1] != output.shape[:-1]:
            raise ConfigError(
                f"layer {self._name} is parallel over {mesh} with inputs placed as "
                f"{hidden.placements} and an output of shape {tuple(output.shape)}: the gradient "
                "probe knows layers whose inputs or outputs are spread over one mesh dimension by "
                "feature; name other layers (probe.layers)"
            )
        if placement.is_shard(last) or placement.is_shard(-1):
            self.tensor_mesh = mesh
            return local, part(mesh, hidden.shape[-1]), whole
        if output.shape[-1] != self._out_features:
            self.tensor_mesh = mesh
            return local, whole, part(mesh, self._out_features)
        return local, whole, whole


class EmbeddingTap:
    """Watches an embedding whose weight a watched linear layer shares: [vocabulary, size]."""

    def __init__(self, sketch: LayerSketch, layer: nn.Embedding, name: str) -> None:
        self._sketch = sketch
        self._name = name
        self._size = layer.num_embeddings
        self._padding = layer.padding_idx
        self.tensor_mesh = None

    def watch(
        self, inputs: tuple[Any, ...], output: torch.Tensor, domain_ids: torch.Tensor
    ) -> Watched:
        """Return what the embedding adds, given the tokens that were looked up."""
        check_shape(output, domain_ids, self._name)
        tokens = inputs[0]
        if self._sketch.out_projection is None:
            kept = functional.one_hot(tokens, self._size).float()
        else:
            kept = self._sketch.out_projection[tokens]
        if self._padding is not None:
            kept = kept * (tokens != self._padding)[..., None]
        kept = by_sequence(kept, domain_ids)
        return Watched(self._sketch, kept, self._sketch.in_projection, kept_is_rows=True)


def part(mesh: Any, size: int) -> slice:
    """Return which of `size` features this rank of a one-dimensional mesh holds."""
    chunk = -(-size // mesh.size())
    first = min(mesh.get_local_rank() * chunk, size)
    return slice(first, min(first + chunk, size))


def make_tap(sketch: LayerSketch, layer: nn.Module, name: str) -> LinearTap | EmbeddingTap:
    """Return the tap for a layer that holds a watched weight."""
    if isinstance(layer, nn.Linear):
        return LinearTap(sketch, layer, name)
    assert isinstance(layer, nn.Embedding)
    return EmbeddingTap(sketch, layer, name)
