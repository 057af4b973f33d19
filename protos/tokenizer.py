"""What a run must know of its tokenizer, read from a `tokenizer.json`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tokenizers import Tokenizer

from protos.errors import TokenizerInvalid


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """What all parts of a run agree on about the tokenizer."""

    vocab_size: int
    """Highest token id plus 1, so that every id fits an embedding of that size."""

    eot_id: int
    """Id of the end-of-text token."""

    sha256: str
    """Of the file, in hexadecimal."""


def load_tokenizer(data: bytes, *, source: str) -> Tokenizer:
    """Return the tokenizer that a `tokenizer.json` describes; `source` names it in errors.

    Padding and truncation that the file may ask for are switched off: packing does both. Special
    tokens that a text spells out are encoded as ordinary text.

    Raises:
        TokenizerInvalid: the bytes are not one.
    """
    remedy = "data.tokenizer must be a `tokenizer.json` of the Hugging Face tokenizers library"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerInvalid(f"{source} is not a tokenizer file: not UTF-8; {remedy}") from error
    try:
        tokenizer = Tokenizer.from_str(text)
    # The library raises bare Exception.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TokenizerInvalid(f"{source} is not a tokenizer file: {reason}; {remedy}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Text that spells a special token is text: a document cannot end itself.
    tokenizer.encode_special_tokens = True
    return tokenizer


def describe_tokenizer(data: bytes, *, eot_token: str, source: str) -> TokenizerInfo:
    """Return what a run must know of the tokenizer in `data`; `source` names it in errors.

    Raises:
        TokenizerInvalid: the bytes are not a tokenizer file, or it has no token `eot_token`.
    """
    tokenizer = load_tokenizer(data, source=source)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise TokenizerInvalid(f"{source} has no tokens at all; train or choose another tokenizer")
    eot_id = vocabulary.get(eot_token)
    if eot_id is None:
        raise TokenizerInvalid(
            f"{source} has no token {eot_token!r}; set data.eot_token to its end-of-text token"
        )
    return TokenizerInfo(
        vocab_size=max(vocabulary.values()) + 1,
        eot_id=eot_id,
        sha256=hashlib.sha256(data).hexdigest(),
    )
