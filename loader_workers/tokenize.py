"""Text to token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from protos.tokenizer import load_tokenizer

Tokenize = Callable[[Sequence[str]], list[NDArray[np.uint32]]]
"""Turns texts into token ids, one array a text, nothing added."""


def make_tokenize(data: bytes, *, source: str = "the run's tokenizer") -> Tokenize:
    """Return the function that a `tokenizer.json` describes; it runs outside the GIL.

    Raises:
        TokenizerInvalid: the bytes are not a tokenizer.
    """
    tokenizer = load_tokenizer(data, source=source)

    def tokenize(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    return tokenize
