"""Token shards: a shard's token ids in one flat file that is checked whole, then read by places.

    magic 8 | header bytes uint32 | payload bytes uint64 | SHA-256 32 | header (JSON) | payload

The payload is uint64 document offsets, then tokens; the header says how many of each. The hash
covers everything else in the file. All numbers are little-endian.

Tokens are copied by system calls and never mapped: to read a mapped file that somebody has cut off
ends the process (SIGBUS), and no check before can rule that out.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_workers.convert import Documents
from protos.errors import NotReady
from protos.failpoints import DurableWrite, Failpoint

MAGIC = b"HRTOKEN1"
_WRITTEN = Failpoint("token_shard.written", "after a token shard is written, before it is synced")
_RENAME = DurableWrite("token_shard.rename", "a synced token shard gets its name")
_PREFIX = struct.Struct("<8sIQ32s")
_ALIGNMENT = 64
_HASHED_AT_ONCE = 4 << 20
_BUFFERS_A_CALL = os.sysconf("SC_IOV_MAX")

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Positions = NDArray[np.int64]


class TokenShardDamaged(Exception):
    """A token shard cannot be trusted; it is built again. Never leaves the cache."""


class TokenShard:
    """The token ids of a shard, document by document. While one lives its file is not evicted.

    Thread-safe.
    """

    def __init__(self, documents: Documents, file: _TokenFile | None = None) -> None:
        """Hold documents; their tokens are read from `file` each time if there is one."""
        self.offsets: Positions = documents.offsets.view(np.int64)
        """[documents + 1]"""

        self.num_tokens = int(self.offsets[-1])
        self.dtype = documents.tokens.dtype
        self.unreadable = documents.unreadable
        self.lost = documents.lost
        self._tokens = documents.tokens
        self._file = file

    @property
    def num_bytes(self) -> int:
        """How much its offsets and tokens take."""
        return self.offsets.nbytes + self.num_tokens * self.dtype.itemsize

    @property
    def tokens(self) -> Tokens:
        """A copy of all its tokens."""
        every: Tokens = np.empty(self.num_tokens, self.dtype)
        self.scatter(every, *(np.array([each]) for each in (0, 0, self.num_tokens)))
        return every

    def is_unchanged(self) -> bool:
        """Tell whether its file still is what it was when it was opened."""
        return self._file is None or self._file.is_unchanged()

    def scatter(
        self, target: Tokens, places: Positions, starts: Positions, lengths: Positions
    ) -> None:
        """Copy runs of tokens: `lengths` of them from each of `starts`, to `places` of `target`.

        Raises:
            NotReady: the file no longer has them, or was changed.
        """
        order = np.argsort(starts)
        runs = [each[order].tolist() for each in (places, starts, lengths)]
        if self._file is None:
            for place, start, length in zip(*runs, strict=True):
                target[place : place + length] = self._tokens[start : start + length]
            return
        whole = target.data
        buffers: list[memoryview] = []
        first = end = 0
        for place, start, length in zip(*runs, strict=True):
            # What lies together in the file is read by one call, wherever it goes.
            if buffers and (start != end or len(buffers) == _BUFFERS_A_CALL):
                self._file.read_tokens(buffers, first)
                buffers = []
            if not buffers:
                first = end = start
            buffers.append(whole[place : place + length])
            end += length
        if buffers:
            self._file.read_tokens(buffers, first)
        # After the reads: the time of a change is there before what was changed can be read.
        if not self._file.is_unchanged():
            raise self._file.changed()


class _TokenFile:
    """The open file of a token shard, under a shared lock until nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._identity = self._identify()
        self.num_bytes, _ = self._identity
        self.tokens_at = 0
        """In bytes."""

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def is_unchanged(self) -> bool:
        return self._identify() == self._identity

    def read(self, at: int, num_bytes: int) -> bytes:
        """Return the bytes from `at` on.

        Raises:
            TokenShardDamaged: there are fewer.
        """
        data = os.pread(self._descriptor, num_bytes, at)
        if len(data) < num_bytes:
            raise TokenShardDamaged(f"{self._path} is cut off")
        return data

    def chunks(self, at: int) -> Iterator[bytes]:
        """Yield the bytes from `at` on; raises as `read` does."""
        for start in range(at, self.num_bytes, _HASHED_AT_ONCE):
            yield self.read(start, min(_HASHED_AT_ONCE, self.num_bytes - start))

    def read_tokens(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill `buffers`, one after the other, with the tokens from `start` on.

        Raises:
            NotReady: they cannot be read, or there are fewer.
        """
        num_bytes = sum(each.nbytes for each in buffers)
        at = self.tokens_at + start * buffers[0].itemsize
        try:
            found = os.preadv(self._descriptor, buffers, at)
        except OSError as error:
            raise NotReady(f"cannot read the token shard {self._path}: {error}") from error
        if found < num_bytes:
            raise self.changed()

    def changed(self) -> NotReady:
        """Return what is raised where somebody has changed the file."""
        return NotReady(
            f"somebody changed the token shard {self._path}, which is built again; open the "
            "stream again"
        )


def write_token_shard(path: Path, documents: Documents) -> None:
    """Write a token shard under a temporary name, sync it and rename it.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    header = _header(documents)
    offsets = documents.offsets.astype("<u8").tobytes()
    tokens = documents.tokens.tobytes()
    prefix_fields = (MAGIC, len(header), len(offsets) + len(tokens))
    digest = _digest(_PREFIX.pack(*prefix_fields, bytes(32)), header, offsets, tokens)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="writing-", delete=False) as file:
        try:
            # Held until the file is closed: a lock that is free marks what a killed writer left.
            fcntl.flock(file, fcntl.LOCK_EX)
            for part in (_PREFIX.pack(*prefix_fields, digest), header, offsets, tokens):
                file.write(part)
            file.flush()
            _WRITTEN.hit()
            os.fsync(file.fileno())
            with _RENAME.around():
                Path(file.name).rename(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    _sync_directory(path.parent)


def open_token_shard(path: Path, *, verify: bool) -> TokenShard:
    """Open a token shard; `verify` reads it whole and checks its hash.

    A shared lock is held for as long as it lives.

    Raises:
        FileNotFoundError: there is none.
        TokenShardDamaged: it is cut off, or not what was written.
    """
    file = _TokenFile(path)
    magic, header_bytes, payload_bytes, digest = _PREFIX.unpack(file.read(0, _PREFIX.size))
    if magic != MAGIC or file.num_bytes != _PREFIX.size + header_bytes + payload_bytes:
        raise TokenShardDamaged(f"{path} is no token shard, or cut off")
    if verify:
        blank = _PREFIX.pack(magic, header_bytes, payload_bytes, bytes(32))
        if _digest(blank, *file.chunks(_PREFIX.size)) != digest:
            raise TokenShardDamaged(f"{path} has other bytes than were written")
    return TokenShard(_documents(file, header_bytes), file)


def _header(documents: Documents) -> bytes:
    fields = {
        "dtype": documents.tokens.dtype.newbyteorder("<").str,
        "documents": len(documents.offsets) - 1,
        "tokens": len(documents.tokens),
        "unreadable": documents.unreadable,
    }
    header = json.dumps(fields, sort_keys=True).encode()
    # Spaces, which JSON ignores, bring the payload to a boundary that any dtype may start at.
    return header + b" " * (-(_PREFIX.size + len(header)) % _ALIGNMENT)


def _documents(file: _TokenFile, header_bytes: int) -> Documents:
    """Return all but the tokens, and tell the file where those are."""
    payload_at = _PREFIX.size + header_bytes
    try:
        header = json.loads(file.read(_PREFIX.size, header_bytes))
        count = header["documents"] + 1
        offsets = np.frombuffer(file.read(payload_at, 8 * count), "<u8")
        dtype = np.dtype(header["dtype"])
        file.tokens_at = payload_at + 8 * count
        is_whole = file.tokens_at + header["tokens"] * dtype.itemsize == file.num_bytes
        unreadable = tuple((int(sample), str(reason)) for sample, reason in header["unreadable"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokenShardDamaged(f"a token shard's header cannot be read: {error}") from error
    if not is_whole or offsets[-1] != header["tokens"]:
        raise TokenShardDamaged("a token shard's header and its size do not fit")
    return Documents(offsets=offsets, tokens=np.empty(0, dtype), unreadable=unreadable)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; the worst is a shard built twice.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
