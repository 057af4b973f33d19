"""Token shards: a shard's token ids in one flat file that is checked whole, then memory-mapped.

    magic 8 | header bytes uint32 | payload bytes uint64 | SHA-256 32 | header (JSON) | payload

The payload is uint64 document offsets, then tokens; the header says how many of each. The hash
covers everything else in the file. All numbers are little-endian.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_workers.convert import Documents
from protos.failpoints import DurableWrite, Failpoint

MAGIC = b"HRTOKEN1"
_WRITTEN = Failpoint("token_shard.written", "after a token shard is written, before it is synced")
_RENAME = DurableWrite("token_shard.rename", "a synced token shard gets its name")
_PREFIX = struct.Struct("<8sIQ32s")
_ALIGNMENT = 64
_HASHED_AT_ONCE = 4 << 20


class TokenShardDamaged(Exception):
    """A token shard cannot be trusted; it is built again. Never leaves the cache."""


class TokenShard:
    """The token ids of a shard, document by document. While one lives its file is not evicted."""

    def __init__(self, documents: Documents) -> None:
        self.offsets: NDArray[np.int64] = documents.offsets.view(np.int64)
        """[documents + 1]"""

        self.tokens = documents.tokens
        self.unreadable = documents.unreadable
        self.lost = documents.lost


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
    """Map a token shard; `verify` reads it whole and checks its hash.

    A shared lock is held for as long as the map lives.

    Raises:
        FileNotFoundError: there is none.
        TokenShardDamaged: it is cut off, or not what was written.
    """
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_size < _PREFIX.size:
            raise TokenShardDamaged(f"{path} is cut off")
        # The map keeps a duplicate of the descriptor, and with it the lock.
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    magic, header_bytes, payload_bytes, digest = _PREFIX.unpack_from(mapped)
    if magic != MAGIC or len(mapped) != _PREFIX.size + header_bytes + payload_bytes:
        raise TokenShardDamaged(f"{path} is no token shard, or cut off")
    if verify:
        blank = _PREFIX.pack(magic, header_bytes, payload_bytes, bytes(32))
        if _digest(blank, memoryview(mapped)[_PREFIX.size :]) != digest:
            raise TokenShardDamaged(f"{path} has other bytes than were written")
    return TokenShard(_documents(mapped, header_bytes))


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


def _documents(mapped: mmap.mmap, header_bytes: int) -> Documents:
    payload_at = _PREFIX.size + header_bytes
    try:
        header = json.loads(mapped[_PREFIX.size : payload_at])
        count = header["documents"] + 1
        offsets = np.frombuffer(mapped, "<u8", count=count, offset=payload_at)
        dtype = np.dtype(header["dtype"])
        tokens = np.frombuffer(mapped, dtype, count=header["tokens"], offset=payload_at + 8 * count)
        unreadable = tuple((int(sample), str(reason)) for sample, reason in header["unreadable"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokenShardDamaged(f"a token shard's header cannot be read: {error}") from error
    return Documents(offsets=offsets, tokens=tokens, unreadable=unreadable)


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), _HASHED_AT_ONCE):
            digest.update(view[at : at + _HASHED_AT_ONCE])
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
