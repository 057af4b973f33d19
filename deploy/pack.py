"""Documents into webdataset shards: the same documents make the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from webdataset.writer import TarWriter  # type: ignore[import-untyped]

from deploy.documents import Document, Sieve
from deploy.parallel import Mapper, in_turn
from protos.errors import ConfigError, DataError

MANIFEST = "pack.json"
DEFAULT_SHARD_MB = 64

Progress = Callable[[str, int, int], None]
"""Is told domain, documents and bytes as they grow."""

_PROGRESS_EVERY = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDomain:
    """What became of a domain."""

    num_documents: int
    num_bytes: int
    """Of text."""

    num_shards: int
    num_short: int
    """Documents left out: too short."""

    num_duplicates: int
    """Documents left out: the same text came before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainToPack:
    """A domain, and how it is packed; goes to another process if a mapper takes it there."""

    name: str
    documents: Iterable[Document]
    folder: Path
    shard_bytes: int
    min_characters: int
    progress: Progress | None = None


def pack(
    domains: Mapping[str, Iterable[Document]],
    out: Path,
    *,
    shard_mb: float = DEFAULT_SHARD_MB,
    min_characters: int = 1,
    progress: Progress | None = None,
    mapper: Mapper = in_turn,
) -> dict[str, PackedDomain]:
    """Write `out/domain/domain-000000.tar` and so on for every domain, and a manifest.

    All is written into a folder beside `out`, which gets its name when it is complete. `mapper`
    may pack domains in parallel; the documents then go to other processes, and `progress` hears
    of a domain when it is done.

    Raises:
        ConfigError: `out` is there already, or a broken-off packing left its folder behind.
        DataError: a domain has no document.
    """
    if shard_mb <= 0:
        raise ConfigError(f"--shard-mb must be above 0, got {shard_mb}")
    packed = {}
    with _folder_in_one_move(out) as partial:
        tasks = [
            DomainToPack(
                name=name,
                documents=documents,
                folder=partial / name,
                shard_bytes=int(shard_mb * 2**20),
                min_characters=min_characters,
                progress=progress if mapper is in_turn else None,
            )
            for name, documents in domains.items()
        ]
        for task, domain in zip(tasks, mapper(_pack_domain, tasks), strict=True):
            packed[task.name] = domain
            if progress is not None:
                progress(task.name, domain.num_documents, domain.num_bytes)
        manifest = {name: asdict(domain) for name, domain in packed.items()}
        (partial / MANIFEST).write_text(json.dumps({"domains": manifest}, indent=2) + "\n")
    return packed


def partial_folder(out: Path) -> Path:
    """Return where `out` is written before it is complete."""
    return out.with_name(out.name + ".partial")


@contextmanager
def _folder_in_one_move(out: Path) -> Iterator[Path]:
    partial = partial_folder(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name another folder, or delete it")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(
            f"{partial} is there: another packing writes it or broke off; if none runs, delete it"
        ) from error
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _pack_domain(task: DomainToPack) -> PackedDomain:
    name, progress = task.name, task.progress
    sieve = Sieve(min_characters=task.min_characters)
    task.folder.mkdir(parents=True)
    num_documents = num_bytes = num_shards = 0
    with _Shards(task.folder, name, task.shard_bytes) as shards:
        for document in sieve.keep(task.documents):
            text = document.text.encode()
            shards.write(f"{num_documents:09d}", text)
            num_documents += 1
            num_bytes += len(text)
            if progress is not None and num_documents % _PROGRESS_EVERY == 0:
                progress(name, num_documents, num_bytes)
        num_shards = shards.num_shards
    if not num_documents:
        raise DataError(f"domain {name!r} has no document to pack")
    return PackedDomain(
        num_documents=num_documents,
        num_bytes=num_bytes,
        num_shards=num_shards,
        num_short=sieve.num_short,
        num_duplicates=sieve.num_duplicates,
    )


class _Shards:
    """Shard after shard of one domain; the next begins when one is full."""

    def __init__(self, folder: Path, name: str, shard_bytes: int) -> None:
        self._folder = folder
        self._name = name
        self._shard_bytes = shard_bytes
        self._left = 0
        self._tar: TarWriter | None = None
        self.num_shards = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def write(self, key: str, text: bytes) -> None:
        if self._tar is None or self._left <= 0:
            self._close()
            path = self._folder / f"{self._name}-{self.num_shards:06d}.tar"
            # Fixed owner and time: the same documents make the same bytes, hence the same index.
            self._file = path.open("wb")
            self._tar = TarWriter(
                self._file, user="headrace", group="headrace", mtime=0, encoder=False
            )
            self._left = self._shard_bytes
            self.num_shards += 1
        self._tar.write({"__key__": key, "txt": text})
        self._left -= len(text)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = None
