"""Opens a shard for one strict pass: every byte is hashed on the way to the tar reader."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager

from loader_workers.location import local_path, parse_location
from loader_workers.remote import REMOTE, Remote
from loader_workers.streams import (
    HashedStream,
    LocalObject,
    Opened,
    expanded,
    is_compressed,
    translate_os_error,
)
from loader_workers.tar import TarReader

_LOCAL_CHUNK_BYTES = 1 << 20


class OpenShard:
    """A shard that is being read once, from front to back."""

    def __init__(self, packed: HashedStream, *, num_bytes: int, url: str) -> None:
        self._packed = packed
        self.num_bytes = num_bytes
        self.archive = io.BufferedReader(expanded(packed, shard=url), _LOCAL_CHUNK_BYTES)
        size = None if is_compressed(url) else num_bytes
        self.members = TarReader(self.archive, num_bytes=size, shard=url)

    def sha256(self) -> str:
        """Return the hash of the whole file; read all members first."""
        return self._packed.sha256()


@contextmanager
def open_object(url: str, *, remote: Remote = REMOTE) -> Iterator[Opened]:
    """Open a shard to read anywhere in it.

    Raises:
        ShardUnreadable: it cannot be opened, or reading fails within the block.
        NotReady: this process is short of something, or the shard's store cannot be reached.
    """
    location = parse_location(url)
    try:
        if location.is_local:
            with local_path(url).open("rb", buffering=0) as raw:
                yield LocalObject(raw)
        else:
            yield remote.open(location)
    except OSError as error:
        raise translate_os_error(error, url) from error


@contextmanager
def open_shard(url: str, *, remote: Remote = REMOTE) -> Iterator[OpenShard]:
    """Open a shard for a pass from front to back; raises as `open_object` does."""
    is_local = parse_location(url).is_local
    chunk_bytes = _LOCAL_CHUNK_BYTES if is_local else remote.settings.chunk_bytes
    with (
        open_object(url, remote=remote) as source,
        closing(HashedStream(source, chunk_bytes=chunk_bytes, ahead=not is_local)) as packed,
    ):
        yield OpenShard(packed, num_bytes=source.num_bytes, url=url)
