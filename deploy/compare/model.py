"""GPTs small enough to train many times on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from deploy.examples.models import SHAPES as PYTHIA_SHAPES
from deploy.examples.models import make_model as make_pythia
from protos.errors import ConfigError

_INITIAL_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallShape:
    """Pre-norm blocks, learned positions, an output layer of its own, no biases in linear layers.

    About twice as fast on one core as transformers' GPT-NeoX of the same size.
    """

    num_layers: int
    hidden_size: int
    num_heads: int


SMALL_SHAPES = {
    "nano": SmallShape(num_layers=3, hidden_size=16, num_heads=2),
    "300k": SmallShape(num_layers=3, hidden_size=64, num_heads=2),
    "1m": SmallShape(num_layers=3, hidden_size=128, num_heads=4),
    "3m": SmallShape(num_layers=4, hidden_size=224, num_heads=7),
    "10m": SmallShape(num_layers=6, hidden_size=352, num_heads=11),
}
"""By their size with a vocabulary of 2,048."""

MODEL_NAMES = (*SMALL_SHAPES, *PYTHIA_SHAPES)


class _Block(nn.Module):
    def __init__(self, shape: SmallShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self._num_heads = shape.num_heads
        self.attention_norm = nn.LayerNorm(size)
        self.attention_in = nn.Linear(size, 3 * size, bias=False)
        self.attention_out = nn.Linear(size, size, bias=False)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 4 * size, bias=False)
        self.down = nn.Linear(4 * size, size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        sequences, length, size = hidden.shape
        projected: torch.Tensor = self.attention_in(self.attention_norm(hidden))
        heads = projected.view(sequences, length, 3, self._num_heads, size // self._num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).reshape(hidden.shape))
        inner = functional.gelu(self.up(self.feed_forward_norm(hidden)), approximate="tanh")
        result: torch.Tensor = hidden + self.down(inner)
        return result


class SmallGpt(nn.Module):
    """[sequences, tokens] ids to [sequences, tokens, vocabulary] logits."""

    def __init__(self, shape: SmallShape, *, vocab_size: int, sequence_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(sequence_length, shape.hidden_size)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream starts smaller in a deeper model (GPT-2).
                added = name.endswith(("attention_out.weight", "down.weight"))
                scale = 1 / math.sqrt(2 * shape.num_layers) if added else 1.0
                nn.init.normal_(parameter, std=_INITIAL_DEVIATION * scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        hidden = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


class _LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens).logits
        return logits


def check_model(name: str) -> None:
    """Refuse a name that no model has.

    Raises:
        ConfigError: none has it.
    """
    if name not in MODEL_NAMES:
        raise ConfigError(f"there is no model {name!r}: choose one of {', '.join(MODEL_NAMES)}")


def make_model(name: str, *, vocab_size: int, sequence_length: int, seed: int) -> nn.Module:
    """Return a model that gives logits for tokens; the same seed, the same weights.

    Raises:
        ConfigError: no model has that name.
    """
    check_model(name)
    torch.manual_seed(seed)
    if name in SMALL_SHAPES:
        return SmallGpt(SMALL_SHAPES[name], vocab_size=vocab_size, sequence_length=sequence_length)
    return _LogitsOnly(make_pythia(name, vocab_size, sequence_length))


def matrix_parameters(model: nn.Module) -> int:
    """Return how many weights take part in a multiplication for each token: what its cost goes by.

    That is all linear layers, and no embedding.
    """
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(linear.weight.numel() for linear in linears)
