"""Turns a shard into token ids, document by document, and holds it against its index entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader_workers.samples import Sample, read_samples
from loader_workers.shard_file import open_shard
from loader_workers.tokenize import Tokenize
from protos.dataset_index import ShardRef
from protos.errors import ConfigError, DataError, ShardUnreadable

_BATCH_CHARACTERS = 1 << 20
"""Texts are tokenized in batches of about this size, so that memory stays bounded."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Documents:
    """The token ids of all samples of a shard. An unreadable sample is an empty document."""

    offsets: NDArray[np.uint64]
    """[samples + 1]: where each document starts in `tokens`, and the end."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    unreadable: tuple[tuple[int, str], ...] = ()
    """Sample and reason."""

    lost: str = ""
    """Why the whole shard is left out; empty: it is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converter:
    """How the shards of a run become token ids."""

    tokenize: Tokenize | None
    """None: the run has no tokenizer, and every sample must hold token ids."""

    text_field: str
    vocab_size: int
    dtype: np.dtype[np.uint16] | np.dtype[np.uint32]

    def convert(self, shard: ShardRef) -> Documents:
        """Read, check and tokenize a shard; one that is not what the index says is lost whole."""
        try:
            return self._read(shard)
        except (DataError, ConfigError) as error:
            offsets = np.zeros(shard.num_samples + 1, dtype=np.uint64)
            return Documents(offsets=offsets, tokens=np.zeros(0, self.dtype), lost=str(error))

    def _read(self, shard: ShardRef) -> Documents:
        parts: list[NDArray[np.uint32]] = []
        unreadable: list[tuple[int, str]] = []
        with open_shard(shard.url) as opened:
            if opened.num_bytes != shard.num_bytes:
                raise ShardUnreadable(
                    f"{shard.url} has {opened.num_bytes} bytes, the dataset index says "
                    f"{shard.num_bytes}"
                )
            samples = read_samples(opened.members, text_field=self.text_field)
            for number, tokens in enumerate(self._tokenized(samples)):
                if isinstance(tokens, str):
                    unreadable.append((number, tokens))
                parts.append(np.zeros(0, np.uint32) if isinstance(tokens, str) else tokens)
            if opened.sha256() != shard.sha256:
                raise ShardUnreadable(
                    f"{shard.url} has other bytes than when the dataset index was built "
                    "(SHA-256 differs)"
                )
        if len(parts) != shard.num_samples:
            raise ShardUnreadable(
                f"{shard.url} has {len(parts)} samples, the dataset index says {shard.num_samples}"
            )
        offsets = np.zeros(len(parts) + 1, dtype=np.uint64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        joined = np.concatenate([np.zeros(0, np.uint32), *parts])
        tokens = joined.astype(np.uint16) if self.dtype.itemsize == 2 else joined
        return Documents(offsets=offsets, tokens=tokens, unreadable=tuple(unreadable))

    def _tokenized(self, samples: Iterator[Sample]) -> Iterator[NDArray[np.uint32] | str]:
        """Yield each sample's token ids, or why it has none."""
        batch: list[Sample] = []
        characters = 0
        for sample in samples:
            batch.append(sample)
            if isinstance(sample.document, str):
                characters += len(sample.document)
            if characters >= _BATCH_CHARACTERS:
                yield from self._batch(batch)
                batch, characters = [], 0
        yield from self._batch(batch)

    def _batch(self, batch: list[Sample]) -> Iterator[NDArray[np.uint32] | str]:
        texts = [sample.document for sample in batch if isinstance(sample.document, str)]
        encoded = iter(self.tokenize(texts) if self.tokenize and texts else [])
        for sample in batch:
            if sample.document is None:
                yield sample.reason
            elif not isinstance(sample.document, str):
                yield self._checked(sample.document, sample.key)
            elif self.tokenize is None:
                yield f"sample {sample.key!r}: it holds text, and the run has no tokenizer"
            else:
                yield self._checked(next(encoded), sample.key)

    def _checked(self, tokens: NDArray[np.uint32], key: str) -> NDArray[np.uint32] | str:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            return (
                f"sample {key!r}: token id {tokens.max()} is not below vocab_size {self.vocab_size}"
            )
        return tokens
