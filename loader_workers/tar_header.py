"""Headers of a tar archive: those that nearly every shard has, parsed at once."""

from __future__ import annotations

import re
import tarfile
from typing import NamedTuple

_USUAL = re.compile(
    rb"(?P<name>.{100})"
    rb"[0-7]{7}\0[0-7]{7}\0[0-7]{7}\0"  # mode, owner, group
    rb"(?P<size>[0-7]{11})\0[0-7]{11}\0"  # and when it was changed
    rb"(?P<checksum>[0-7]{6})\0 (?P<type>[0x]).{100}"
    rb"ustar\x0000.{64}"  # magic, version, names of owner and group
    rb"(?:[0-7]{7}\0|\0{8}){2}"  # device
    rb"(?P<prefix>.{155})\0{12}",
    re.DOTALL,
)
_CHECKSUM = slice(148, 156)


class Header(NamedTuple):
    """What is needed of a header."""

    name: str
    size: int
    type: bytes


def parse_usual(header: bytes) -> Header | None:
    """Parse a POSIX header of a regular file or of PAX records, as tarfile does.

    None: it is another kind of header, or a wrong one; then tarfile must say what it is.
    """
    found = _USUAL.fullmatch(header)
    if found is None:
        return None
    # The checksum's own bytes count as spaces.
    total = sum(header[: _CHECKSUM.start]) + 8 * ord(" ") + sum(header[_CHECKSUM.stop :])
    if total != int(found["checksum"], 8):
        return None
    name, prefix = _text(found["name"]), _text(found["prefix"])
    return Header(
        name=f"{prefix}/{name}" if prefix else name,
        size=int(found["size"], 8),
        type=found["type"],
    )


def parse(header: bytes) -> Header:
    """Parse any header.

    Raises:
        tarfile.HeaderError: it is none.
        ValueError: the same.
    """
    usual = parse_usual(header)
    if usual is not None:
        return usual
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    return Header(name=info.name, size=info.size, type=info.type)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
