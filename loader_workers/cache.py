"""The shard cache: every shard is tokenized once on a machine, and read from a file from then on.

Several workers may share a folder. Locks on files keep them from building the same shard twice
and from evicting what another one has open; a killed worker's locks fall by themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

from loader_workers.build_pool import NOW, BuildPool
from loader_workers.convert import Converter
from loader_workers.token_shard import (
    TokenShard,
    TokenShardDamaged,
    open_token_shard,
    write_token_shard,
)
from protos.dataset_index import ShardRef
from protos.errors import ConfigError, NotReady
from protos.types import Quarantine

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Part of every key: raise it when the same shard must give other tokens or another file."""

_LOOKS_A_BUDGET = 64
"""How often the folder is looked at while as much as its budget is built."""


class ShardCache:
    """Token shards by shard, built on a few threads, on disk within a budget of bytes.

    Least recently used shards are evicted when a new one is built; never one that is in use, so
    the folder may exceed its budget by that much. Thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        *,
        budget_bytes: int,
        converter: Converter,
        tokenizer_sha256: str,
        threads: int = 1,
    ) -> None:
        self._directory = private_directory(directory)
        self._locks = private_directory(directory / "locks")
        self._budget_bytes = budget_bytes
        self._converter = converter
        self._tokenizer_sha256 = tokenizer_sha256
        self._lock = threading.Lock()
        self._open: weakref.WeakValueDictionary[str, TokenShard] = weakref.WeakValueDictionary()
        # Not on disk, and for as long as the process lives: a lost shard stays lost, so that the
        # order does not change midway, and one that the disk has no room for is not built again.
        self._kept: dict[str, TokenShard] = {}
        self._verified: set[tuple[int, int, int, int]] = set()
        self._quarantines: dict[tuple[str, str, int], Quarantine] = {}
        self._pool: BuildPool[TokenShard] = BuildPool(threads=threads)
        self._remove_leftovers()
        self._num_unseen = 0
        self._num_bytes = sum(size for _, size, _ in self._files())

    def get(self, shard: ShardRef, distance: int = NOW) -> TokenShard:
        """Return a shard's tokens; they are built if they are not there, nearer ones first.

        Raises:
            NotReady: the cache was closed meanwhile, or this process is short of files or memory.
        """
        key = self._key(shard)
        found = self._find(shard, key)
        if found is not None:
            return found
        return self._pool.submit(key, distance, partial(self._build, shard, key)).result()

    def prefetch(self, shards: Iterable[ShardRef], *, distance: int = NOW + 1) -> None:
        """Have shards built, the first ones first, when nothing nearer is asked for."""
        for shard in shards:
            key = self._key(shard)
            with self._lock:
                known = key in self._open or key in self._kept
            if not known and not self._path(key).exists():
                self._pool.submit(key, distance, partial(self._build, shard, key))

    def quarantines(self) -> tuple[Quarantine, ...]:
        """Return what was found unreadable so far, in the order of finding."""
        with self._lock:
            return tuple(self._quarantines.values())

    def num_bytes(self) -> int:
        """Return how much the folder held when something was last built here."""
        return self._num_bytes

    def close(self) -> None:
        """Stop building; idempotent. Shards handed out stay good."""
        self._pool.close()

    def __enter__(self) -> ShardCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _key(self, shard: ShardRef) -> str:
        parts = [
            FORMAT_VERSION,
            shard.sha256,
            self._tokenizer_sha256,
            self._converter.text_field,
            # Without a tokenizer these decide which token ids are readable, and their width.
            self._converter.vocab_size,
            # Stands between the lines of a `jsonl` member.
            self._converter.eot_id,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.tokens"

    def _find(self, shard: ShardRef, key: str) -> TokenShard | None:
        """Return a shard that is at hand or on disk and sound."""
        with self._lock:
            known = self._open.get(key) or self._kept.get(key)
            if known is not None and not known.is_unchanged():
                logger.warning("somebody changed the token shard of %s", shard.url)
                self._open.pop(key, None)
                known = None
        if known is not None:
            self._note(shard, known)
            return known
        path = self._path(key)
        try:
            status = path.stat()
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            found = open_token_shard(path, verify=identity not in self._verified)
            # Access time is the order of eviction; set by hand, as many mounts do not keep it.
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:
            return None
        except TokenShardDamaged as error:
            logger.warning("token shard of %s is damaged and built again: %s", shard.url, error)
            return None
        except OSError as error:
            raise NotReady(f"cannot open the token shard of {shard.url}: {error}") from error
        with self._lock:
            self._verified.add(identity)
            found = self._open.setdefault(key, found)
        self._note(shard, found)
        return found

    def _build(self, shard: ShardRef, key: str) -> TokenShard:
        with self._only_builder(key):
            found = self._find(shard, key)
            if found is not None:
                return found
            documents = self._converter.convert(shard)
            built = TokenShard(documents)
            if not documents.lost and not documents.damaged:
                try:
                    write_token_shard(self._path(key), documents)
                except OSError as error:
                    logger.warning("cannot cache %s, kept in memory: %s", shard.url, error)
                else:
                    del documents
                    built = self._find(shard, key) or built
        with self._lock:
            if key not in self._open:
                self._kept[key] = built
        self._note(shard, built)
        self._evict(built.num_bytes)
        return built

    @contextlib.contextmanager
    def _only_builder(self, key: str) -> Iterator[None]:
        # A fixed number of lock files, so that none ever has to be removed.
        with (self._locks / key[:2]).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _note(self, shard: ShardRef, found: TokenShard) -> None:
        """Remember what a shard lacks, once."""
        reasons = [(-1, found.lost)] if found.lost else list(found.unreadable)
        for sample, reason in reasons:
            quarantine = Quarantine(
                domain=shard.domain, shard=shard.url, sample=sample, reason=reason
            )
            with self._lock:
                is_new = (shard.domain, shard.url, sample) not in self._quarantines
                self._quarantines.setdefault((shard.domain, shard.url, sample), quarantine)
            if is_new:
                logger.warning("left out shard=%s sample=%d: %s", shard.url, sample, reason)

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return access time, size and path of every token shard, oldest first."""
        files = []
        for path in self._directory.glob("*.tokens"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_atime_ns, status.st_size, path))
        return sorted(files)

    def _evict(self, num_added: int) -> None:
        with self._lock:
            self._num_bytes += num_added
            self._num_unseen += num_added
            # Looking at every file costs more than building one; others may have built as well,
            # so the folder is looked at now and then all the same.
            due = self._num_bytes > self._budget_bytes or (
                self._num_unseen > self._budget_bytes // _LOOKS_A_BUDGET
            )
            if not due:
                return
            self._num_unseen = 0
        with (self._locks / "evict").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = self._files()
            held = sum(size for _, size, _ in files)
            for _, size, path in files:
                if held <= self._budget_bytes:
                    break
                if _remove_if_unused(path):
                    held -= size
            self._num_bytes = held

    def _remove_leftovers(self) -> None:
        """Remove what killed writers left: their locks are free."""
        for path in self._directory.glob("writing-*"):
            _remove_if_unused(path)


def private_directory(path: Path) -> Path:
    """Make a folder that only this user may use.

    Raises:
        ConfigError: it cannot be made, or belongs to somebody else or is open to others.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"cache folder {path} cannot be made: {error.strerror}") from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ConfigError(
            f"cache folder {path} must belong to you and be writable by you alone "
            f"(owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}); choose another"
        )
    return path


def _remove_if_unused(path: Path) -> bool:
    """Remove a file that nobody has locked."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:
        # Somebody uses it, or removed it first.
        return False
    return True
