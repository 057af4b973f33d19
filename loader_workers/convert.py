"""Turns a shard into token ids, document by document, and holds it against its index entry."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_workers.remote import REMOTE, Remote
from loader_workers.salvage import salvage
from loader_workers.sample_map import Place, map_path, read_sample_map
from loader_workers.samples import Sample, read_samples
from loader_workers.shard_file import open_shard
from loader_workers.tokenize import Tokenize
from protos.dataset_index import ShardRef
from protos.errors import ConfigError, DataError, ShardUnreadable
from protos.spec import QUARANTINE_SHARD, SKIP_SAMPLE, RunSpec

logger = logging.getLogger(__name__)

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

    damaged: bool = False
    """The shard is no longer what it was; `unreadable` names what that cost, and may be mended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converter:
    """How the shards of a run become token ids."""

    tokenize: Tokenize | None
    """None: the run has no tokenizer, and every sample must hold token ids."""

    text_field: str
    vocab_size: int
    eot_id: int
    dtype: np.dtype[np.uint16] | np.dtype[np.uint32]

    samples_folder: Path | None = None
    """Where the maps of the shards' samples are; None: a damaged shard is lost whole."""

    on_damage: str = SKIP_SAMPLE
    remote: Remote = REMOTE

    @classmethod
    def of_run(cls, spec: RunSpec, tokenize: Tokenize | None) -> Converter:
        """Return the converter that all who read a run's shards must share."""
        return cls(
            tokenize=tokenize,
            text_field=spec.text_field,
            vocab_size=spec.vocab_size,
            eot_id=spec.eot_id,
            dtype=spec.token_dtype,
            samples_folder=Path(spec.samples_folder) if spec.samples_folder else None,
            on_damage=spec.on_damage,
        )

    def convert(self, shard: ShardRef) -> Documents:
        """Read, check and tokenize a shard.

        Of one that is not what the index says, the samples are kept whose bytes still are.

        Raises:
            NotReady: it cannot be read now, which says nothing about it.
        """
        try:
            return self._read(shard)
        except (DataError, ConfigError) as error:
            places = None
            if self.samples_folder is not None and self.on_damage != QUARANTINE_SHARD:
                places = read_sample_map(map_path(self.samples_folder, shard.sha256))
            if places is None or len(places) != shard.num_samples:
                return self._lost(shard, str(error))
            return self._salvaged(shard, places, str(error))

    def _lost(self, shard: ShardRef, reason: str) -> Documents:
        offsets = np.zeros(shard.num_samples + 1, dtype=np.uint64)
        return Documents(offsets=offsets, tokens=np.zeros(0, self.dtype), lost=reason)

    def _salvaged(self, shard: ShardRef, places: Sequence[Place], reason: str) -> Documents:
        samples = salvage(shard.url, places, text_field=self.text_field, remote=self.remote)
        documents = self._joined(self._tokenized(samples))
        readable = sum(bool(place.ending) for place in places)
        if len(documents.unreadable) - (len(places) - readable) >= readable:
            return self._lost(shard, reason)
        logger.warning(
            "shard=%s is damaged, %d of its %d samples are left out: %s",
            shard.url,
            len(documents.unreadable),
            len(places),
            reason,
        )
        is_as_indexed = len(documents.unreadable) == len(places) - readable
        # Damage that the index knows of is what the shard is: it may be kept like any other.
        return replace(documents, damaged=not (shard.num_unreadable and is_as_indexed))

    def _read(self, shard: ShardRef) -> Documents:
        with open_shard(shard.url, remote=self.remote) as opened:
            if opened.num_bytes != shard.num_bytes:
                raise ShardUnreadable(
                    f"{shard.url} has {opened.num_bytes} bytes, the dataset index says "
                    f"{shard.num_bytes}"
                )
            samples = read_samples(opened.members, text_field=self.text_field)
            documents = self._joined(self._tokenized(samples))
            if opened.sha256() != shard.sha256:
                raise ShardUnreadable(
                    f"{shard.url} has other bytes than when the dataset index was built "
                    "(SHA-256 differs)"
                )
        num_samples = len(documents.offsets) - 1
        if num_samples != shard.num_samples:
            raise ShardUnreadable(
                f"{shard.url} has {num_samples} samples, the dataset index says {shard.num_samples}"
            )
        return documents

    def _joined(self, converted: Iterator[NDArray[np.uint32] | str]) -> Documents:
        parts: list[NDArray[np.uint32]] = []
        unreadable: list[tuple[int, str]] = []
        for number, tokens in enumerate(converted):
            if isinstance(tokens, str):
                unreadable.append((number, tokens))
            parts.append(np.zeros(0, np.uint32) if isinstance(tokens, str) else tokens)
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
            characters += sum(len(text) for text in _texts(sample))
            if characters >= _BATCH_CHARACTERS:
                yield from self._batch(batch)
                batch, characters = [], 0
        yield from self._batch(batch)

    def _batch(self, batch: list[Sample]) -> Iterator[NDArray[np.uint32] | str]:
        texts = [text for sample in batch for text in _texts(sample)]
        encoded = iter(self.tokenize(texts) if self.tokenize and texts else [])
        for sample in batch:
            if sample.document is None:
                yield sample.reason
            elif isinstance(sample.document, np.ndarray):
                yield self._checked(sample.document, sample.key)
            elif self.tokenize is None:
                yield f"sample {sample.key!r}: it holds text, and the run has no tokenizer"
            else:
                tokens = self._with_ends([next(encoded) for _ in _texts(sample)])
                yield self._checked(tokens, sample.key)

    def _with_ends(self, documents: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
        """Join the documents of one sample as those of a window are."""
        full = [document for document in documents if len(document)]
        if len(full) == 1:
            return full[0]
        end = np.array([self.eot_id], dtype=np.uint32)
        parts = [part for document in full for part in (end, document)]
        return np.concatenate(parts[1:]) if parts else np.zeros(0, np.uint32)

    def _checked(self, tokens: NDArray[np.uint32], key: str) -> NDArray[np.uint32] | str:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            return (
                f"sample {key!r}: token id {tokens.max()} is not below vocab_size {self.vocab_size}"
            )
        return tokens


def _texts(sample: Sample) -> tuple[str, ...]:
    if isinstance(sample.document, str):
        return (sample.document,)
    return sample.document if isinstance(sample.document, tuple) else ()
