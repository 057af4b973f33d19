"""A comparison's data: three splits by document hash, made once and shared by all of its trials."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.config import DataSection as RunData
from controller.config import RunConfig
from deploy.compare.spec import CompareSpec, DataSection, Settings
from deploy.compare.splits import Split, SplitDocuments
from deploy.dataset import ensure_index, read_index
from deploy.documents import Document, Sieve
from deploy.pack import pack, partial_folder
from deploy.parallel import choose
from deploy.progress import Progress
from deploy.sources import Documents, find_domains, text_domains
from deploy.tokenizer import END_OF_TEXT, train_tokenizer
from deploy.whole_file import write_whole
from loader_workers.cache import ShardCache
from loader_workers.convert import Converter
from loader_workers.tokenize import Tokenize, make_tokenize
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, DataError
from protos.keyed import permutation
from protos.spec import RunSpec
from protos.tokenizer import describe_tokenizer

PREPARED_FILE = "prepared.json"
_SHARDS = "shards"
_TOKENIZER = "tokenizer.json"
_INDEX = "index.parquet"
_CACHE = "tokens"
_EPOCH_TOKENS = "epoch_tokens.json"

_SHARD_MB = 4.0
_WORTH_PROCESSES = 16 << 20
"""Bytes of text; with less, other processes would take longer to start than to pack."""

_CACHE_BYTES = 50_000_000_000
_BATCH_DOCUMENTS = 256
_SELECTION_SEED = 0
"""Which held-out sequences are taken is the same for every seed of a comparison."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class HeldOut:
    """Held-out tokens, as many of each domain as of any other."""

    test: NDArray[np.uint16]
    """[domains, sequences, sequence_length + 1]"""

    policy_validation: NDArray[np.uint16]
    """[domains, sequences, sequence_length + 1]"""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Where a comparison's data lies."""

    folder: Path
    domains: tuple[str, ...]

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, trained on the train split."""
        return self.folder / _TOKENIZER

    @property
    def index(self) -> Path:
        """The dataset index of the train split."""
        return self.folder / _INDEX

    def run_section(self) -> Settings:
        """Return the `data` part of a run file that reads the train split."""
        shards = {
            name: {"shards": [str(self.folder / _SHARDS / name / "*.tar")]} for name in self.domains
        }
        return {"index": str(self.index), "tokenizer": str(self.tokenizer), "domains": shards}

    def cache(self, spec: RunSpec) -> ShardCache:
        """Open the cache of token shards that all trials share."""
        data = self.tokenizer.read_bytes()
        converter = Converter.of_run(spec, make_tokenize(data))
        return ShardCache(
            self.folder / _CACHE,
            budget_bytes=_CACHE_BYTES,
            converter=converter,
            tokenizer_sha256=hashlib.sha256(data).hexdigest(),
            threads=len(os.sched_getaffinity(0)),
        )

    def epoch_tokens(self) -> list[int]:
        """Return each domain's tokens in an epoch; `tokenize_all` has counted them."""
        counts = json.loads((self.folder / _EPOCH_TOKENS).read_text())
        return [int(counts[name]) for name in self.domains]

    def held_out(self, spec: CompareSpec) -> HeldOut:
        """Read the held-out tokens that `prepare_data` made."""
        with np.load(self.folder / _held_out_name(spec)) as arrays:
            return HeldOut(**{split: arrays[split] for split in _held_out_counts(spec)})


def prepared_folder(spec: CompareSpec, out: Path) -> Path:
    """Return where a comparison's data is or will be."""
    return (spec.data.prepared or out / "data").absolute()


def source_domains(spec: CompareSpec) -> tuple[str, ...]:
    """Return the names of the source's domains.

    Raises:
        ConfigError: there is no such folder, or it holds no text.
    """
    return tuple(_Source.of(spec.data).documents)


def open_data(spec: CompareSpec, out: Path) -> PreparedData:
    """Return data that has been prepared.

    Raises:
        DataError: it has not.
    """
    folder = prepared_folder(spec, out)
    path = folder / PREPARED_FILE
    if not path.is_file():
        raise DataError(f"there is no prepared data in {folder}; run the comparison first")
    return PreparedData(folder, tuple(json.loads(path.read_text())["domains"]))


def prepare_data(spec: CompareSpec, out: Path, progress: Progress) -> PreparedData:
    """Make what is missing of a comparison's data.

    Raises:
        ConfigError: the folder was made from another source or with other settings.
        DataError: the source cannot be read, or holds too little of a domain.
    """
    folder = prepared_folder(spec, out)
    path = folder / PREPARED_FILE
    wanted = _settings(spec.data)
    if path.is_file():
        held = json.loads(path.read_text())["settings"]
        if held != wanted:
            raise ConfigError(
                f"the data in {folder} was made with {json.dumps(held)}, the comparison wants "
                f"{json.dumps(wanted)}; name another data.prepared"
            )
    source = _Source.of(spec.data)
    if not path.is_file():
        _make(source, spec, folder, wanted, progress)
    data = PreparedData(folder, tuple(json.loads(path.read_text())["domains"]))
    if not (folder / _held_out_name(spec)).is_file():
        with progress.stage("choosing the held-out sequences"):
            _hold_out(source, spec, data)
    return data


def _settings(section: DataSection) -> Settings:
    settings = section.model_dump(mode="json", include={"text_field", "vocab_size", "splits"})
    return {"source": str(section.source.absolute()), **settings}


@dataclass(frozen=True, slots=True)
class _Source:
    """The text of all domains, by split."""

    documents: Mapping[str, Documents]
    section: DataSection

    @classmethod
    def of(cls, section: DataSection) -> _Source:
        folder = section.source.absolute()
        found = text_domains(find_domains(folder), folder)
        documents = {domain.name: Documents(domain, section.text_field) for domain in found}
        return cls(documents, section)

    def num_bytes(self) -> int:
        """Return how large the files are."""
        domains = (documents.domain for documents in self.documents.values())
        return sum(path.stat().st_size for domain in domains for path in domain.files)

    def split(self, split: Split) -> dict[str, Iterable[Document]]:
        """Return a split's documents, by domain."""
        return {
            name: SplitDocuments(documents, split, self.section.splits)
            for name, documents in self.documents.items()
        }


def _make(
    source: _Source, spec: CompareSpec, folder: Path, settings: Settings, progress: Progress
) -> None:
    # What an interrupted preparation left; a whole one has its PREPARED_FILE, written last.
    for name in (_SHARDS, _CACHE):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(partial_folder(folder / _SHARDS), ignore_errors=True)
    for stale in (*folder.glob("heldout-*.npz"), *folder.glob(_EPOCH_TOKENS)):
        stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    train = source.split(Split.TRAIN)
    with progress.stage(f"packing the train split of {len(train)} domains"):
        small = source.num_bytes() < _WORTH_PROCESSES
        mapper = choose(len(train), processes=1 if small else 0, ray_address=None)
        packed = pack(train, folder / _SHARDS, shard_mb=_SHARD_MB, mapper=mapper)
    with progress.stage(f"training a tokenizer of {spec.data.vocab_size} tokens"):
        train_tokenizer(train, folder / _TOKENIZER, vocab_size=spec.data.vocab_size)
    data = PreparedData(folder, tuple(train))
    with progress.stage("indexing the shards") as update:
        run_data = RunData.model_validate(data.run_section())
        ensure_index(
            RunConfig.model_construct(data=run_data),
            rebuild=True,
            progress=lambda done, total: update(f"{done:,} of {total:,} shards"),
        )
    made: dict[str, Any] = {"settings": settings, "domains": list(train)}
    made["train"] = {name: asdict(domain) for name, domain in packed.items()}
    write_whole(folder / PREPARED_FILE, json.dumps(made, indent=2) + "\n")


def tokenize_all(data: PreparedData, spec: RunSpec) -> None:
    """Have every shard tokenized, so that no trial waits for it, and count the tokens."""
    path = data.folder / _EPOCH_TOKENS
    if path.is_file():
        return
    index: DatasetIndex = read_index(data.index)
    with data.cache(spec) as cache:
        cache.prefetch(shard for domain in index.domains for shard in index.shards(domain))
        counts = {
            domain: sum(cache.get(shard).num_tokens for shard in index.shards(domain))
            for domain in index.domains
        }
    write_whole(path, json.dumps(counts, indent=2) + "\n")


def _held_out_counts(spec: CompareSpec) -> dict[str, int]:
    return {
        Split.TEST.value: spec.data.test_sequences,
        Split.POLICY_VALIDATION.value: spec.data.validation_sequences,
    }


def _held_out_name(spec: CompareSpec) -> str:
    counts = "-".join(str(count) for count in _held_out_counts(spec).values())
    return f"heldout-{spec.batch.sequence_length}-{counts}.npz"


def _hold_out(source: _Source, spec: CompareSpec, data: PreparedData) -> None:
    tokenizer = data.tokenizer.read_bytes()
    eot_id = describe_tokenizer(tokenizer, eot_token=END_OF_TEXT, source=str(data.tokenizer)).eot_id
    cutter = _Cutter(make_tokenize(tokenizer), eot_id, spec.batch.sequence_length)
    arrays: dict[str, Any] = {}
    for split, count in _held_out_counts(spec).items():
        documents = source.split(Split(split))
        arrays[split] = np.stack(
            [cutter.cut(name, split, documents[name], count) for name in data.domains]
        )
    path = data.folder / _held_out_name(spec)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


@dataclass(frozen=True, slots=True)
class _Cutter:
    """Cuts held-out documents into sequences, and takes some from all over them."""

    tokenize: Tokenize
    eot_id: int
    sequence_length: int

    def cut(
        self, domain: str, split: str, documents: Iterable[Document], count: int
    ) -> NDArray[np.uint16]:
        """Return [count, sequence_length + 1] tokens.

        Documents are joined with the end-of-text token between them, as in training, and cut into
        sequences that do not overlap; a keyed draw says which are taken.

        Raises:
            DataError: the split is too small.
        """
        texts = [document.text for document in Sieve(min_characters=1).keep(documents)]
        pieces: list[NDArray[np.uint32]] = []
        for first in range(0, len(texts), _BATCH_DOCUMENTS):
            for tokens in self.tokenize(texts[first : first + _BATCH_DOCUMENTS]):
                pieces += [tokens, np.full(1, self.eot_id, np.uint32)]
        joined = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
        width = self.sequence_length + 1
        num_whole = len(joined) // width
        if num_whole < count:
            raise DataError(
                f"domain {domain!r} has {len(texts)} documents in the {split} split, enough for "
                f"{num_whole} sequences of {self.sequence_length} tokens, but {count} are wanted: "
                f"lower data.{split.removeprefix('policy_')}_sequences or raise data.splits.{split}"
            )
        rows = joined[: num_whole * width].reshape(num_whole, width)
        chosen = np.sort(permutation(num_whole, _SELECTION_SEED, "held out", split, domain)[:count])
        return rows[chosen].astype(np.uint16)
