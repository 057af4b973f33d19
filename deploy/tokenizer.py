"""A run's tokenizer: a given one copied, or a byte-level BPE trained on a sample of its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.documents import Document
from protos.errors import TokenizerInvalid
from protos.tokenizer import load_tokenizer

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 4096
SAMPLE_CHARACTERS = 1_000_000
"""Of each domain: more makes the training slower and the vocabulary hardly better."""


def train_tokenizer(
    domains: Mapping[str, Iterable[Document]],
    out: Path,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> None:
    """Train a byte-level BPE on the first documents of every domain; the same text, the same file.

    Raises:
        TokenizerInvalid: `vocab_size` has no room for the bytes and the end-of-text token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise TokenizerInvalid(
            f"a byte-level vocabulary holds more than {len(alphabet)} tokens, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(domains), trainer)
    _write(out, tokenizer.to_str())


def _sample(domains: Mapping[str, Iterable[Document]]) -> Iterator[str]:
    for documents in domains.values():
        num_characters = 0
        for document in islice(documents, SAMPLE_CHARACTERS):
            yield document.text[: SAMPLE_CHARACTERS - num_characters]
            num_characters += len(document.text)
            if num_characters >= SAMPLE_CHARACTERS:
                break


def copy_tokenizer(given: Path, out: Path) -> None:
    """Copy a tokenizer.json into the run's folder.

    Raises:
        TokenizerInvalid: the file cannot be read or is not a tokenizer.
    """
    try:
        data = given.read_bytes()
    except OSError as error:
        raise TokenizerInvalid(f"{given} cannot be read: {error.strerror}") from error
    load_tokenizer(data, source=str(given))
    _write(out, data.decode())


def _write(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
