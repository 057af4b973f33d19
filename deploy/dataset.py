"""A run's index, tokenizer and the order that they lead to, from its run file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.config import RunConfig, run_spec
from deploy.parallel import Mapper
from loader_workers.index import Progress, build_index, write_index
from loader_workers.reference import Reference
from loader_workers.tokenize import Tokenize, make_tokenize
from protos.dataset_index import DatasetIndex
from protos.errors import IndexMismatch, TokenizerInvalid
from protos.spec import RunSpec
from protos.tokenizer import TokenizerInfo, describe_tokenizer
from protos.types import Lane


def ensure_index(
    config: RunConfig,
    *,
    rebuild: bool = False,
    progress: Progress | None = None,
    mapper: Mapper | None = None,
) -> DatasetIndex:
    """Return the run's index; build it and keep it if there is none yet.

    `mapper` reads shards in parallel; None: on a few threads.

    Raises:
        DataError: shards are missing or unreadable, or the index is not one.
    """
    path = config.data.index
    if path.exists() and not rebuild:
        return read_index(path)
    index = build_index(
        {name: domain.shards for name, domain in config.data.domains.items()},
        text_field=config.data.text_field,
        max_bad_share=config.data.max_bad_share,
        on_damage=config.data.on_damage,
        samples_folder=config.data.samples_folder,
        partial=path.with_suffix(".partial.jsonl"),
        progress=progress,
        mapper=mapper,
    )
    write_index(index, path)
    return index


def read_index(path: Path) -> DatasetIndex:
    """Return the index in a file.

    Raises:
        IndexMismatch: it cannot be read or is not an index.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IndexMismatch(f"cannot read the dataset index {path}: {error.strerror}") from error
    return DatasetIndex.from_parquet(data, source=str(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What the order of a run's data depends on."""

    spec: RunSpec
    index: DatasetIndex
    tokenizer: bytes | None
    """None: every shard holds token ids."""


def open_dataset(config: RunConfig) -> Dataset:
    """Return what a run reads, from its run file.

    Raises:
        DataError: the index or the tokenizer cannot be used.
        ConfigError: they and the run file do not fit.
    """
    index = read_index(config.data.index)
    data = None
    info: TokenizerInfo | None = None
    if config.data.tokenizer is not None:
        try:
            data = config.data.tokenizer.read_bytes()
        except OSError as error:
            raise TokenizerInvalid(
                f"cannot read the tokenizer {config.data.tokenizer}: {error.strerror}"
            ) from error
        info = describe_tokenizer(
            data, eot_token=config.data.eot_token, source=str(config.data.tokenizer)
        )
    spec = run_spec(config, index, info, needs=frozenset())
    return Dataset(spec=spec, index=index, tokenizer=data)


class ShardOrder:
    """What each lane should get, cut anew from the raw shards."""

    def __init__(self, dataset: Dataset) -> None:
        tokenize: Tokenize | None = None
        if dataset.tokenizer is not None:
            tokenize = make_tokenize(dataset.tokenizer)
        self._reference = Reference(dataset.spec, dataset.index, tokenize)

    def num_windows(self, domain: str, lane: int, epoch: int) -> int:
        """Return how many windows a lane has in an epoch."""
        return self._reference.num_windows(domain, Lane(lane), epoch)

    def window(self, domain: str, lane: int, epoch: int, window: int) -> Sequence[str]:
        """Return the SHA-256 of every sequence of a window, in order."""
        tokens, _ = self._reference.sequences(domain, Lane(lane), epoch, window)
        return [hashlib.sha256(sequence.tobytes()).hexdigest() for sequence in tokens]
