"""Small GPTs to train by name: Pythia's published shapes, random weights, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What tells one GPT-NeoX from another; the feed-forward part is four times as wide."""

    num_layers: int
    hidden_size: int
    num_heads: int


SHAPES = {
    "tiny": Shape(num_layers=4, hidden_size=128, num_heads=4),
    "14m": Shape(num_layers=6, hidden_size=128, num_heads=4),
    "70m": Shape(num_layers=6, hidden_size=512, num_heads=8),
    "160m": Shape(num_layers=12, hidden_size=768, num_heads=12),
    "410m": Shape(num_layers=24, hidden_size=1024, num_heads=16),
    "1b": Shape(num_layers=16, hidden_size=2048, num_heads=8),
}


def make_model(name: str, vocab_size: int, sequence_length: int) -> nn.Module:
    """Return a model that gives logits for tokens as `model(tokens).logits`.

    The weights come from torch's global generator; seed it first.

    Raises:
        ConfigError: no model has that name.
    """
    if name not in SHAPES:
        raise ConfigError(f"there is no model {name!r}: choose one of {', '.join(SHAPES)}")
    # Slow to import, and only the process that trains needs it.
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = SHAPES[name]
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.hidden_size,
        max_position_embeddings=sequence_length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = GPTNeoXForCausalLM(config)
    return model
