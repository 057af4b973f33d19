"""Where every sample of a shard lies and what its bytes were when the dataset index was built.

One file a shard, named by the shard's SHA-256, in a folder beside the index. It is looked at only
when a shard turns out to be damaged: then the samples whose bytes are still what they were are
read one by one, however the archive around them looks. So it costs nothing at start-up.

    magic 8 | SHA-256 of all that follows 32 | count uint64 | count x (offset, size, ending, digest)
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos.failpoints import DurableWrite

MAGIC = b"HRSAMPL1"
_RENAME = DurableWrite("sample_map.rename", "a map of a shard's samples gets its name")
_PREFIX = struct.Struct("<8s32sQ")
_DIGEST_BYTES = 16
_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("ending", "S8"), ("digest", "u1", (_DIGEST_BYTES,))]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The member that a sample's document is read from."""

    ending: str
    """Empty: the sample was unreadable when the index was built."""

    offset: int = 0
    """Of its content in the archive, expanded if the shard is compressed."""

    size: int = 0
    digest: bytes = bytes(_DIGEST_BYTES)


UNREADABLE = Place(ending="")


def digest_of(content: bytes) -> bytes:
    """Return what stands for a sample's bytes."""
    return hashlib.sha256(content).digest()[:_DIGEST_BYTES]


def map_path(folder: Path, shard_sha256: str) -> Path:
    """Return where the map of a shard is."""
    return folder / shard_sha256[:2] / f"{shard_sha256}.samples"


def write_sample_map(path: Path, places: Sequence[Place]) -> None:
    """Write a shard's map under a temporary name and rename it.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    rows: NDArray[np.void] = np.zeros(len(places), dtype=_DTYPE)
    rows["offset"] = [place.offset for place in places]
    rows["size"] = [place.size for place in places]
    rows["ending"] = [place.ending.encode() for place in places]
    digests = b"".join(place.digest for place in places)
    rows["digest"] = np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST_BYTES)
    body = rows.tobytes()
    data = _PREFIX.pack(MAGIC, hashlib.sha256(body).digest(), len(places)) + body
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".map-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            Path(file.name).chmod(0o644)
            with _RENAME.around():
                Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_sample_map(path: Path) -> list[Place] | None:
    """Return a shard's map; None if there is none that can be trusted."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _PREFIX.size:
        return None
    magic, digest, count = _PREFIX.unpack_from(data)
    body = data[_PREFIX.size :]
    if magic != MAGIC or len(body) != count * _DTYPE.itemsize:
        return None
    if hashlib.sha256(body).digest() != digest:
        return None
    rows = np.frombuffer(body, dtype=_DTYPE)
    return [
        Place(
            ending=row["ending"].decode(),
            offset=int(row["offset"]),
            size=int(row["size"]),
            digest=row["digest"].tobytes(),
        )
        for row in rows
    ]
