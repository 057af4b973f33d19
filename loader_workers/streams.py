"""Shards as streams: local or remote, plain or compressed, hashed on the way, within limits."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Protocol

import zstandard

from protos.errors import NotReady, ShardUnreadable
from protos.retry import Retry

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a process or machine that has run out of something, not of the file."""

PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT)
"""Errors of disks and network file systems that may not come again."""

LOCAL_RETRY = Retry(first_wait_s=0.05, max_wait_s=1.0)
LOCAL_TRIES = 6

MAX_RATIO = 200
"""Text shrinks to a tenth, now and then to a fiftieth; what swells more is no text."""

MAX_SWELL_FREE = 64 << 20
"""So much may come out of any archive whatever its ratio."""

MAX_EXPANDED_BYTES = 64 << 30
MAX_WINDOW_BYTES = 128 << 20
"""Memory that a zstandard stream may ask for: that of `zstd --long`."""


class Opened(Protocol):
    """A shard that can be read anywhere."""

    num_bytes: int

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes from `offset` on; fewer only at the end."""


class LocalObject:
    """A local file; errors that may pass are tried again."""

    def __init__(self, raw: BinaryIO) -> None:
        self._descriptor = raw.fileno()
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes from `offset` on; fewer only at the end.

        Raises:
            OSError: it cannot be read, though it was tried again where that may help.
        """
        for num_tries in range(1, LOCAL_TRIES + 1):
            try:
                return os.pread(self._descriptor, num_bytes, offset)
            except OSError as error:
                if error.errno not in PASSING or num_tries == LOCAL_TRIES:
                    raise
            time.sleep(LOCAL_RETRY.wait_s(num_tries))
        raise AssertionError("the last try returns or raises")


class HashedStream(io.RawIOBase):
    """An object from front to back, the next chunk on its way while one is read; hashed."""

    def __init__(self, source: Opened, *, chunk_bytes: int, ahead: bool) -> None:
        super().__init__()
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._digest = hashlib.sha256()
        self._chunk = memoryview(b"")
        self._asked = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-ahead") if ahead else None
        self._next: Future[bytes] | None = None
        self.num_read = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than Buffer
        """Fill `buffer` and hash what came."""
        if not self._chunk:
            self._chunk = memoryview(self._fetch())
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        self.num_read += count
        return count

    def _fetch(self) -> bytes:
        data = self._next.result() if self._next is not None else self._read(self._asked)
        self._next = None
        self._asked += len(data)
        self._digest.update(data)
        if self._pool is not None and self._asked < self._source.num_bytes:
            self._next = self._pool.submit(self._read, self._asked)
        return data

    def _read(self, offset: int) -> bytes:
        return self._source.read_at(offset, self._chunk_bytes)

    def sha256(self) -> str:
        """Read to the end and return the hash of all that came."""
        while self._fetch():
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Let go of what is on its way; idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        super().close()


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Expanded(io.RawIOBase):
    """What a compressed stream expands to, within limits; damage is `ShardUnreadable`."""

    def __init__(self, expanded: _Readable, packed: HashedStream, *, shard: str) -> None:
        super().__init__()
        self._expanded = expanded
        self._packed = packed
        self._shard = shard
        self._num_bytes = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than Buffer
        """Expand into `buffer`, never more than fits."""
        try:
            data = self._expanded.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise ShardUnreadable(
                f"{self._shard}: its compressed data is damaged or cut off: {error} "
                f"(after {self._num_bytes} bytes of it came out)"
            ) from error
        self._num_bytes += len(data)
        limit = MAX_SWELL_FREE + MAX_RATIO * self._packed.num_read
        if self._num_bytes > min(limit, MAX_EXPANDED_BYTES):
            raise ShardUnreadable(
                f"{self._shard}: {self._packed.num_read} compressed bytes expand to more than "
                f"{self._num_bytes - len(data)} (a bomb? at most {MAX_RATIO} times as many, and "
                f"{MAX_EXPANDED_BYTES} in all, are read)"
            )
        buffer[: len(data)] = data
        return len(data)


def _gzip(packed: HashedStream) -> _Readable:
    return gzip.GzipFile(fileobj=io.BufferedReader(packed, 1 << 16), mode="rb")


def _zstd(packed: HashedStream) -> _Readable:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    buffered = io.BufferedReader(packed, 1 << 16)
    return decompressor.stream_reader(buffered, read_across_frames=True, closefd=False)


_EXPANDERS: dict[str, Callable[[HashedStream], _Readable]] = {
    ".tar.gz": _gzip,
    ".tgz": _gzip,
    ".tar.zst": _zstd,
    ".tar.zstd": _zstd,
}

ENDINGS = (".tar", *_EXPANDERS)
"""Of shards."""


def is_compressed(url: str) -> bool:
    """Say whether a shard has to be expanded, by its name."""
    return url.lower().endswith(tuple(_EXPANDERS))


def expanded(packed: HashedStream, *, shard: str) -> io.RawIOBase:
    """Return the archive inside a stream, by the shard's name."""
    for ending, expander in _EXPANDERS.items():
        if shard.lower().endswith(ending):
            return Expanded(expander(packed), packed, shard=shard)
    return packed


def translate_os_error(error: OSError, url: str) -> NotReady | ShardUnreadable:
    """Return what an error of the system says about the shard, or only about this process."""
    if error.errno in SHORTAGES:
        return NotReady(f"cannot read {url} now: {error.strerror}")
    return ShardUnreadable(f"{url}: {error.strerror or error}")
