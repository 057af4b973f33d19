"""Opens a shard for one strict pass: every byte is hashed on the way to the tar reader."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from loader_workers.tar import TarReader
from protos.errors import ConfigError, NotReady, ShardUnreadable

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a process or machine that has run out of something, not of the file."""

_BUFFER_BYTES = 1 << 20


class _HashingFile(io.RawIOBase):
    """A file that hashes what is read from it."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__()
        self._raw = raw
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than Buffer
        """Fill `buffer` from the file and hash what came."""
        data = self._raw.read(len(buffer))
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def hexdigest(self) -> str:
        """Return the hash of what was read so far."""
        return self._digest.hexdigest()


class OpenShard:
    """A shard that is being read once, from front to back."""

    def __init__(self, raw: BinaryIO, *, num_bytes: int, url: str) -> None:
        self._hashing = _HashingFile(raw)
        self.num_bytes = num_bytes
        buffered = io.BufferedReader(self._hashing, _BUFFER_BYTES)
        self.members = TarReader(buffered, num_bytes=num_bytes, shard=url)

    def sha256(self) -> str:
        """Return the hash of the whole file; read all members first."""
        while self._hashing.read(_BUFFER_BYTES):
            pass
        return self._hashing.hexdigest()


def local_path(url: str) -> Path:
    """Return the path that a shard's URL names.

    Raises:
        ConfigError: the URL is not one of a local file.
    """
    scheme = urlsplit(url).scheme if ":" in url.split("/", 1)[0] else ""
    if scheme not in ("", "file"):
        raise ConfigError(
            f"shard {url} has the scheme {scheme!r}; only local paths and file: URLs are read"
        )
    return Path(unquote(urlsplit(url).path)) if scheme else Path(url)


@contextmanager
def open_shard(url: str) -> Iterator[OpenShard]:
    """Open a shard.

    Raises:
        ShardUnreadable: it cannot be opened, or reading fails within the block.
        NotReady: this process is short of files or memory, which says nothing about the shard.
    """
    try:
        with local_path(url).open("rb") as raw:
            num_bytes = os.fstat(raw.fileno()).st_size
            yield OpenShard(raw, num_bytes=num_bytes, url=url)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise NotReady(f"cannot read {url} now: {error.strerror}") from error
        raise ShardUnreadable(f"{url}: {error.strerror or error}") from error
