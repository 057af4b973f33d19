"""How a layer is watched: a tap on its output, through which gradients flow on unchanged.

Nothing here looks at a gradient from a backward hook, which torch.compile does not capture and a
CUDA graph runs at capture only. The tap is an autograd function like any other: compiled with the
model, recomputed by activation checkpointing, replayed by a CUDA graph.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from protos.errors import ConfigError
from trainer_client.sketch import LayerSketch


class Clock:
    """Host seconds that the probe took in a step; code that torch.compile made counts none."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Watched:
    """What one application of a layer needs to add to a sketch."""

    sketch: LayerSketch
    kept: torch.Tensor
    """[sequences, tokens, p or q]: the side that the forward pass knows, projected"""

    projection: torch.Tensor | None
    """[size, q or p]: of the output's gradient"""

    kept_is_rows: bool
    """True: `kept` is the sketch's p side, and the gradient its q side"""


class Tap(torch.autograd.Function):
    """The identity, whose backward adds a domain's tokens to the gradient of an accumulator."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        accumulator: torch.Tensor,
        parts: torch.Tensor | None,
        kept: torch.Tensor,
        projection: torch.Tensor | None,
        domain_ids: torch.Tensor,
        kept_is_rows: bool,
        clock: Clock | None,
    ) -> torch.Tensor:
        """Return what `output` holds; see `Watched` for the rest."""
        # Cloned, as the next micro-batch's ids may stand there before this one's backward pass.
        ctx.save_for_backward(kept, projection, domain_ids.clone())
        ctx.num_domains = accumulator.shape[0]
        ctx.kept_is_rows = kept_is_rows
        ctx.clock = clock
        # Cloned, since autograd refuses to change in place what a function returned as a view, and
        # a model may well go on with `hidden += residual`. The original is freed at once.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Pass the gradient on; the accumulator's is [domains, p, q], that of `parts` [domains]."""
        begun = 0.0 if ctx.clock is None else time.perf_counter()
        gradient = gradients[0]
        kept, projection, domain_ids = ctx.saved_tensors
        taken = by_sequence(gradient.detach(), domain_ids)
        if projection is not None:
            taken = taken @ projection.to(taken.dtype)
        rows, columns = (kept, taken) if ctx.kept_is_rows else (taken, kept)
        sums = domain_sums(rows, columns, domain_ids, ctx.num_domains)
        squares = None
        if ctx.needs_input_grad[2]:
            squares = square_norms(rows, columns, domain_ids, ctx.num_domains)
        if ctx.clock is not None:
            ctx.clock.elapsed_s += time.perf_counter() - begun
        return gradient, sums, squares, None, None, None, None, None


def domain_sums(
    rows: torch.Tensor, columns: torch.Tensor, domain_ids: torch.Tensor, num_domains: int
) -> torch.Tensor:
    """Return [domains, p, q] float32: the sum over each domain's tokens of row times column.

    Args:
        rows: [sequences, tokens, p]
        columns: [sequences, tokens, q]
        domain_ids: [sequences], or [sequences, tokens] where a sequence holds several domains; a
            token of domain -1 counts nowhere.
        num_domains: how many domains there are.
    """
    rows, columns = rows.float(), columns.float()
    if domain_ids.ndim == 1:
        each = torch.bmm(rows.transpose(1, 2), columns).float()
        sums = torch.zeros(num_domains, *each.shape[1:], device=each.device)
        return sums.index_add(0, domain_ids, each)
    domains = torch.arange(num_domains, device=domain_ids.device)
    mine = domain_ids.flatten()[:, None] == domains
    apart = rows.flatten(0, 1)[:, None, :] * mine[:, :, None]
    sums = apart.flatten(1).T @ columns.flatten(0, 1)
    return sums.float().view(num_domains, rows.shape[2], columns.shape[2])


def square_norms(
    rows: torch.Tensor, columns: torch.Tensor, domain_ids: torch.Tensor, num_domains: int
) -> torch.Tensor:
    """Return [domains] float32: squared norms of the sequences' [p, q] sums, summed by domain.

    Args:
        rows: [sequences, tokens, p]
        columns: [sequences, tokens, q]
        domain_ids: [sequences]; sequences that hold several domains are not told apart, and give 0.
        num_domains: how many domains there are.
    """
    squares = torch.zeros(num_domains, device=rows.device)
    if domain_ids.ndim != 1:
        return squares
    each = torch.bmm(rows.float().transpose(1, 2), columns.float()).float()
    return squares.index_add(0, domain_ids, each.square().sum(dim=(1, 2)))


def by_sequence(hidden: torch.Tensor, domain_ids: torch.Tensor) -> torch.Tensor:
    """View hidden states as [sequences, tokens, size].

    Args:
        hidden: that, or [tokens, sequences, size] as in Megatron, or [sequences * tokens, size].
        domain_ids: [sequences] or [sequences, tokens]
    """
    num_sequences = domain_ids.shape[0]
    if hidden.ndim == 2:
        return hidden.reshape(num_sequences, -1, hidden.shape[1])
    return hidden if hidden.shape[0] == num_sequences else hidden.transpose(0, 1)


def check_shape(hidden: torch.Tensor, domain_ids: torch.Tensor, layer: str) -> None:
    """Make sure that hidden states are of this micro-batch.

    Raises:
        ConfigError: they are not.
    """
    num_sequences = domain_ids.shape[0]
    shape = tuple(hidden.shape)
    if hidden.ndim == 3 and num_sequences in shape[:2]:
        num_tokens = shape[1] if shape[0] == num_sequences else shape[0]
    elif hidden.ndim == 2 and shape[0] % num_sequences == 0:
        num_tokens = shape[0] // num_sequences
    else:
        num_tokens = -1
    if num_tokens < 0 or (domain_ids.ndim == 2 and domain_ids.shape[1] != num_tokens):
        raise ConfigError(
            f"the gradient probe cannot tell which hidden states of layer {layer} belong to which "
            f"of the micro-batch's {num_sequences} sequences: its shape is {shape}; watch layers "
            "whose states lie sequence by sequence (probe.layers)"
        )


def dtensor_type() -> type | None:
    """Return DTensor's class; None: nobody has imported it, so no tensor is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)
