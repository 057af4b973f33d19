"""Finds what is left of a shard that is damaged when it is read for the first time.

Nothing is known of such a shard but itself. A sample is taken only if its headers check and it lies
whole in the file. After damage the next header that checks is looked for, wherever it lies. Where a
header is lost nobody knows what it was of: the samples beside it are taken only if they have just
the members that all other samples of the shard have, for one that misses its text might be read
from its metadata.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from loader_workers.remote import REMOTE, Remote
from loader_workers.sample_map import UNREADABLE, Place
from loader_workers.samples import Group, Sample, groups, sample_of
from loader_workers.shard_file import open_object
from loader_workers.streams import HashedStream, LocalObject, Opened, expanded, is_compressed
from loader_workers.tar import BLOCK, MAX_END_BYTES, TarReader
from protos.errors import ShardUnreadable

TOKEN_BYTES = 4
"""A stored token id counts as so many bytes of text, about what one stands for."""

_MAGIC = b"ustar"
_MAGIC_AT = 257
_SIZE = slice(124, 136)
_WINDOW_BYTES = 4 << 20
_KNOWN_TYPES = frozenset(
    [
        *tarfile.REGULAR_TYPES,
        *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
        *(tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What the index says of a sample, without its document."""

    place: Place
    kind: str
    """`text` or `tokens`; empty: it is unreadable."""

    text_bytes: int
    reason: str
    """Why it is unreadable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescued:
    """What is left of a damaged shard."""

    samples: list[Summary]
    """In order; an unreadable one stands for each stretch of damage."""

    lost_share: float
    """Of the archive's bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    summary: Summary
    endings: frozenset[str] = frozenset()
    is_beside_damage: bool = False


def summary_of(sample: Sample) -> Summary:
    """Return what is kept of a sample."""
    document = sample.document
    kind, text_bytes = "", 0
    if isinstance(document, np.ndarray):
        kind, text_bytes = "tokens", TOKEN_BYTES * len(document)
    elif document is not None:
        texts = (document,) if isinstance(document, str) else document
        kind, text_bytes = "text", sum(len(text.encode()) for text in texts)
    return Summary(place=sample.place, kind=kind, text_bytes=text_bytes, reason=sample.reason)


def rescue(url: str, *, text_field: str, remote: Remote = REMOTE) -> Rescued:
    """Find the samples of a damaged shard that are whole.

    Raises:
        ShardUnreadable: it cannot be read at all.
        NotReady: it cannot be read now.
    """
    with open_object(url, remote=remote) as source:
        if not is_compressed(url):
            return _Rescue(source, url=url, text_field=text_field).run()
        with tempfile.TemporaryFile() as file:
            with closing(HashedStream(source, chunk_bytes=1 << 20, ahead=False)) as packed:
                broken = _expand(expanded(packed, shard=url), file)
            found = _Rescue(LocalObject(file), url=url, text_field=text_field).run()
            # What did not come out of a stream that broke is as much of it as is unread.
            unread = 1 - packed.num_read / max(source.num_bytes, 1) if broken else 0.0
            return replace(found, lost_share=unread + (1 - unread) * found.lost_share)


def _expand(archive: io.RawIOBase, file: io.BufferedRandom) -> bool:
    """Write what comes out of a compressed shard; return whether it broke off."""
    try:
        while chunk := archive.read(_WINDOW_BYTES):
            file.write(chunk)
    except ShardUnreadable:
        return True
    finally:
        file.flush()
    return False


class _From(io.RawIOBase):
    """An object from some place on, as a stream."""

    def __init__(self, source: Opened, start: int) -> None:
        super().__init__()
        self._source = source
        self._at = start

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than Buffer
        """Fill `buffer` as far as there is something."""
        data = self._source.read_at(self._at, len(buffer))
        self._at += len(data)
        buffer[: len(data)] = data
        return len(data)


class _Rescue:
    """One pass over a damaged archive, from one stretch that can be read to the next."""

    def __init__(self, source: Opened, *, url: str, text_field: str) -> None:
        self._source = source
        self._url = url
        self._text_field = text_field
        self._found: list[_Found] = []
        self._keys: set[str] = set()
        self._lost_bytes = 0

    def run(self) -> Rescued:
        """Read all stretches."""
        at = 0
        while at < self._source.num_bytes:
            damage = self._read_from(at)
            if damage is None:
                break
            damaged_at, reason = damage
            at = next_header(self._source, damaged_at)
            lost = at - damaged_at
            self._lost_bytes += lost
            said = f"{lost} bytes of the archive are damaged or cut off: {reason}"
            self._found.append(
                _Found(summary=Summary(place=UNREADABLE, kind="", text_bytes=0, reason=said))
            )
        return Rescued(
            samples=self._decided(),
            lost_share=self._lost_bytes / max(self._source.num_bytes, 1),
        )

    def _read_from(self, start: int) -> tuple[int, str] | None:
        """Collect samples from a header on; return where damage follows, None: the archive ends."""
        stream = io.BufferedReader(_From(self._source, start), 1 << 20)
        reader = TarReader(stream, num_bytes=self._source.num_bytes - start, shard=self._url)
        torn: list[Group] = []
        is_beside_damage = start > 0
        try:
            for group in groups(reader, torn=torn.append):
                self._take(group, start, is_beside_damage=is_beside_damage)
                is_beside_damage = False
        except ShardUnreadable as error:
            damaged_at = start + reader.failed_at
            # One that is torn before its first whole member is the damage itself.
            if torn and torn[0].endings:
                if self._is_in_place(damaged_at):
                    self._take(torn[0], start, is_beside_damage=True)
                else:
                    self._leave_out(torn[0])
            return damaged_at, str(error)
        return None

    def _is_in_place(self, damaged_at: int) -> bool:
        """Say whether the damage begins where a header was.

        Else bytes may be missing or too many before it, and the member there is not what it was;
        where the file ends, nobody knows.
        """
        block = self._source.read_at(damaged_at, BLOCK)
        return block[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC

    def _leave_out(self, group: Group) -> None:
        reason = f"sample {group.key!r}: no header follows on it, so it may not be whole"
        self._keys.add(group.key)
        self._found.append(
            _Found(summary=Summary(place=UNREADABLE, kind="", text_bytes=0, reason=reason))
        )

    def _take(self, group: Group, start: int, *, is_beside_damage: bool) -> None:
        sample = sample_of(group, text_field=self._text_field, archive_at=start)
        if group.key in self._keys:
            reason = f"sample {group.key!r}: another sample of the shard has the same key"
            sample = Sample(key=group.key, document=None, reason=reason)
        self._keys.add(group.key)
        found = _Found(
            summary=summary_of(sample), endings=group.endings, is_beside_damage=is_beside_damage
        )
        self._found.append(found)

    def _decided(self) -> list[Summary]:
        """Leave out samples beside damage that may miss a member."""
        usual = {each.endings for each in self._found if each.endings and not each.is_beside_damage}
        return [
            Summary(
                place=UNREADABLE,
                kind="",
                text_bytes=0,
                reason="a sample beside damage is left out, for it may miss a member",
            )
            if each.is_beside_damage and each.summary.kind and usual != {each.endings}
            else each.summary
            for each in self._found
        ]


def next_header(source: Opened, damaged_at: int) -> int:
    """Return where reading goes on after damage: at a header that checks, or at the end."""
    guess = _after_member(source, damaged_at)
    if guess is not None:
        return guess
    at = damaged_at + 1
    overlap = BLOCK
    while at < source.num_bytes:
        window = source.read_at(at, _WINDOW_BYTES + overlap)
        found = window.find(_MAGIC)
        while found >= 0:
            header_at = at + found - _MAGIC_AT
            if header_at > damaged_at and _is_header(source.read_at(header_at, BLOCK)):
                return header_at
            found = window.find(_MAGIC, found + 1)
        if len(window) <= overlap:
            break
        at += len(window) - overlap
    return source.num_bytes


def _after_member(source: Opened, header_at: int) -> int | None:
    """Return what follows the member whose header is damaged, if its size still leads there."""
    header = source.read_at(header_at, BLOCK)
    digits = header[_SIZE].strip(b" \0")
    if len(header) < BLOCK or not digits or any(each not in b"01234567" for each in digits):
        return None
    size = int(digits, 8)
    follows = header_at + BLOCK + -(-size // BLOCK) * BLOCK
    if follows >= source.num_bytes:
        return None
    block = source.read_at(follows, BLOCK)
    is_end = not any(block) and not any(source.read_at(follows, MAX_END_BYTES))
    return follows if is_end or _is_header(block) else None


def _is_header(block: bytes) -> bool:
    if len(block) < BLOCK or block[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        return False
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return info.type in _KNOWN_TYPES
