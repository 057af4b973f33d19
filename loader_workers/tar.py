"""A strict tar reader: it streams, extracts nothing, and never takes damage for the end.

webdataset's own reader ends a shard quietly at the first bad header and follows links; this one
reads regular members only and says where an archive is damaged.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from loader_workers.tar_header import Header, parse
from protos.errors import ShardUnreadable

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Of a PAX or long-name record; real ones are below a kilobyte."""

MAX_END_BYTES = (1 << 20) + 2 * BLOCK
"""Of zeros at the end of an archive: its mark, and padding to the largest record in use."""

MAX_ARCHIVE_BYTES = 64 << 30
"""Of a compressed shard once it is expanded: a member cannot claim more."""

_CHUNK = 1 << 20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One member of an archive."""

    name: str
    offset: int
    """Of the first byte of its content in the archive."""

    size: int
    refused: str = ""
    """What it is, if it is not a regular file; such a member has no content here."""


class TarReader:
    """Iterates over the members of one archive; `read` gives the content of the newest one."""

    def __init__(self, stream: BinaryIO, *, num_bytes: int | None, shard: str) -> None:
        """Read from `stream`; `num_bytes` is the archive's size, None if only its end will tell."""
        self._stream = stream
        self._num_bytes = num_bytes
        self._shard = shard
        self._offset = 0
        self._unread = 0  # content and padding of the newest member that is still to come
        self._newest: Member | None = None
        self.failed_at = 0
        """Where the archive is damaged, once `ShardUnreadable` was raised."""

    def read(self, member: Member) -> bytes:
        """Return the content of the member that was yielded last; once only.

        Raises:
            ShardUnreadable: the archive is cut off there.
        """
        assert member is self._newest, "only the newest member can be read, and only once"
        self._newest = None
        data = self._take(member.size, what=f"member {member.name!r}")
        self._unread -= member.size
        return data

    def __iter__(self) -> Iterator[Member]:
        """Yield regular members, and those refused, in order.

        Raises:
            ShardUnreadable: the archive is damaged or cut off; says at which member and offset.
        """
        extension: dict[str, str] = {}
        while True:
            self._skip(self._unread, what="the content of a member")
            self._unread = 0
            header_at = self._offset
            header = self._take(BLOCK, what="a header or the end-of-archive mark")
            if not any(header):
                self._check_end(header_at)
                return
            info = self._parse(header, header_at)
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extension = extension | self._pax_records(info, header_at)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extension["path"] = self._long_name(info, header_at)
            elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                self._extension_content(info, header_at)
            else:
                member = self._member(info, extension, header_at)
                extension = {}
                if member is not None:
                    yield member

    def _member(self, info: Header, extension: dict[str, str], header_at: int) -> Member | None:
        name = extension.get("path", info.name)
        size = info.size
        if "size" in extension:
            if not extension["size"].isascii() or not extension["size"].isdigit():
                raise self._damaged(f"PAX size {extension['size']!r} is not a number", header_at)
            size = int(extension["size"])
        is_sparse = any(key.startswith("GNU.sparse") for key in extension)
        if info.type == tarfile.GNUTYPE_SPARSE or is_sparse:
            raise self._damaged(f"member {name!r} is a sparse file, write it whole", header_at)
        if info.type in _REFUSED:
            return Member(name=name, offset=self._offset, size=0, refused=_REFUSED[info.type])
        if info.type == tarfile.DIRTYPE:
            return None
        left = (self._num_bytes or MAX_ARCHIVE_BYTES) - self._offset
        if size < 0 or size > left:
            raise self._damaged(f"member {name!r} claims {size} bytes, {left} are left", header_at)
        self._unread = -(-size // BLOCK) * BLOCK
        if info.type not in _REGULAR:
            kind = f"of the unknown type {info.type!r}"
            return Member(name=name, offset=self._offset, size=0, refused=kind)
        self._newest = Member(name=name, offset=self._offset, size=size)
        return self._newest

    def _parse(self, header: bytes, header_at: int) -> Header:
        try:
            return parse(header)
        except (tarfile.HeaderError, ValueError) as error:
            hint = "; is it compressed? unpack it" if header[:2] == b"\x1f\x8b" else ""
            raise self._damaged(f"not a tar header: {error}{hint}", header_at) from error

    def _extension_content(self, info: Header, header_at: int) -> bytes:
        if not 0 <= info.size <= MAX_EXTENSION_BYTES:
            raise self._damaged(
                f"an extended header claims {info.size} bytes, more than {MAX_EXTENSION_BYTES}",
                header_at,
            )
        content = self._take(info.size, what="an extended header")
        self._skip(-info.size % BLOCK, what="an extended header")
        return content

    def _long_name(self, info: Header, header_at: int) -> str:
        content = self._extension_content(info, header_at)
        return content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")

    def _pax_records(self, info: Header, header_at: int) -> dict[str, str]:
        """Parse `length key=value newline` records; the length counts the whole record."""
        content = self._extension_content(info, header_at)
        records: dict[str, str] = {}
        at = 0
        while at < len(content) and content[at]:
            space = content.find(b" ", at, at + 20)
            digits = content[at:space] if space > 0 else b""
            end = at + int(digits) if digits.isdigit() else -1
            if not space < end <= len(content) or content[end - 1] != ord("\n"):
                raise self._damaged("a PAX record has a wrong length", header_at)
            key, equals, value = content[space + 1 : end - 1].partition(b"=")
            if not equals:
                raise self._damaged("a PAX record has no value", header_at)
            records[key.decode("utf-8", "surrogateescape")] = value.decode(
                "utf-8", "surrogateescape"
            )
            at = end
        return records

    def _check_end(self, mark_at: int) -> None:
        """Two zero blocks end an archive, and nothing but a little padding comes after them."""
        if any(self._take(BLOCK, what="the second block of the end-of-archive mark")):
            raise self._damaged("a block of zeros stands where a header must be", mark_at)
        if self._num_bytes is not None and self._num_bytes - mark_at > MAX_END_BYTES:
            raise self._damaged(
                f"the end-of-archive mark stands {self._num_bytes - mark_at} bytes before the end",
                mark_at,
            )
        rest = self._stream.read(MAX_END_BYTES)
        self._offset += len(rest)
        if any(rest) or len(rest) == MAX_END_BYTES:
            raise self._damaged("data follows the end-of-archive mark", mark_at)
        if self._offset % BLOCK:
            raise self._damaged("its length is no whole number of blocks", mark_at)
        if self._num_bytes is not None and self._offset < self._num_bytes:
            raise self._damaged("the file ends within the padding at the end", self._offset)

    def _skip(self, num_bytes: int, *, what: str) -> None:
        # Read, not sought: whoever hashes the stream must see every byte.
        while num_bytes:
            chunk = min(num_bytes, _CHUNK)
            self._take(chunk, what=what)
            num_bytes -= chunk

    def _take(self, num_bytes: int, *, what: str) -> bytes:
        data = self._stream.read(num_bytes)
        if len(data) < num_bytes:
            raise self._damaged(f"the file ends within {what}", self._offset)
        self._offset += num_bytes
        return data

    def _damaged(self, reason: str, offset: int) -> ShardUnreadable:
        self.failed_at = offset
        return ShardUnreadable(f"{self._shard}: {reason} (at byte {offset})")
