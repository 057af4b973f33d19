"""Reads what is left of a damaged shard: each sample from where it was, if it still is there."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Protocol

from loader_workers.remote import REMOTE, Remote
from loader_workers.sample_map import Place, digest_of
from loader_workers.samples import Sample, SampleUnreadable, decode
from loader_workers.shard_file import open_object
from loader_workers.streams import HashedStream, Opened, expanded, is_compressed
from protos.errors import NotReady, ShardUnreadable

_BLOCK_BYTES = 4 << 20


class _Pieces(Protocol):
    def piece(self, offset: int, size: int) -> bytes: ...


class _Anywhere:
    """Pieces of a plain archive; a large block is read at once, for neighbours lie in it too."""

    def __init__(self, source: Opened) -> None:
        self._source = source
        self._start = 0
        self._block = b""

    def piece(self, offset: int, size: int) -> bytes:
        end = offset + size
        if not self._start <= offset <= end <= self._start + len(self._block):
            self._block = self._source_block(offset, size)
            self._start = offset
        return self._block[offset - self._start : end - self._start]

    def _source_block(self, offset: int, size: int) -> bytes:
        try:
            return self._source.read_at(offset, max(size, _BLOCK_BYTES))
        except OSError:
            # Something in the block cannot be read; perhaps not this piece.
            return self._source.read_at(offset, size)


class _Forward:
    """Pieces of a compressed archive, which can only be read from the front, up to its damage."""

    def __init__(self, archive: io.RawIOBase) -> None:
        self._archive = io.BufferedReader(archive, 1 << 20)
        self._at = 0
        self._broken = ""

    def piece(self, offset: int, size: int) -> bytes:
        if self._broken:
            raise ShardUnreadable(self._broken)
        try:
            while self._at < offset:
                skipped = len(self._archive.read(min(offset - self._at, _BLOCK_BYTES)))
                self._at += skipped
                if not skipped:
                    return b""
            data = self._archive.read(size)
        except ShardUnreadable as error:
            self._broken = str(error)
            raise
        self._at += len(data)
        return data


def salvage(
    url: str, places: Sequence[Place], *, text_field: str, remote: Remote = REMOTE
) -> Iterator[Sample]:
    """Yield every sample of a shard, those as unreadable whose bytes are not what they were.

    Raises:
        NotReady: the shard cannot be read now.
    """
    number = -1
    try:
        with open_object(url, remote=remote) as source:
            if not is_compressed(url):
                anywhere = _Anywhere(source)
                for number, place in enumerate(places):
                    yield _sample(anywhere, number, place, text_field=text_field)
                return
            with closing(HashedStream(source, chunk_bytes=1 << 20, ahead=False)) as packed:
                forward = _Forward(expanded(packed, shard=url))
                for number, place in enumerate(places):
                    yield _sample(forward, number, place, text_field=text_field)
    except ShardUnreadable as error:
        for missing in range(number + 1, len(places)):
            yield Sample(key=str(missing), document=None, reason=str(error))


def _sample(pieces: _Pieces, number: int, place: Place, *, text_field: str) -> Sample:
    key = f"number {number}"
    if not place.ending:
        return _left_out(key, "it was unreadable when the dataset index was built")
    try:
        content = pieces.piece(place.offset, place.size)
        if len(content) != place.size or digest_of(content) != place.digest:
            raise SampleUnreadable(
                f"its {place.size} bytes at byte {place.offset} are not what they were when the "
                "dataset index was built"
            )
        document = decode(content, place.ending, text_field=text_field)
    except NotReady:
        raise
    except (SampleUnreadable, ShardUnreadable, OSError) as error:
        return _left_out(key, str(error))
    return Sample(key=key, document=document, place=place)


def _left_out(key: str, reason: str) -> Sample:
    return Sample(key=key, document=None, reason=f"sample {key}: {reason}")
