"""Groups the members of a shard into samples by webdataset's rules, and decodes each sample.

A member's key is its path up to the first dot of its base name, its ending the rest, in lower
case; members with the same key that follow one another are one sample; names like `__meta__` and
names without a dot are skipped. Token arrays are preferred to text, and `txt` to `json`, which
often holds only metadata of the `txt` beside it. The lines of a `jsonl` are documents of their own
within one sample. No other ending is ever read, pickles least of all.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loader_workers.sample_map import UNREADABLE, Place, digest_of
from loader_workers.tar import Member, TarReader
from protos.errors import ShardUnreadable

TOKEN_ENDINGS = ("npy", "u16", "u32")
TEXT_ENDINGS = ("txt", "json", "jsonl")
ENDINGS = TOKEN_ENDINGS + TEXT_ENDINGS
"""In order of preference."""

MAX_MEMBER_BYTES = 64 << 20
"""A larger document is not read: it would stall the worker and crowd out a whole window."""

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
# What numpy writes for a plain array, and nothing else: its own reader evaluates a literal, which
# fails in many ways on damaged bytes.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (?:True|False), "
    rb"'shape': \(([0-9, ]{0,40})\), \} *\n?"
)
_NPY_LENGTHS = {
    b"\x93NUMPY\x01\x00": struct.Struct("<H"),
    b"\x93NUMPY\x02\x00": struct.Struct("<I"),
}

Document = str | tuple[str, ...] | NDArray[np.uint32]
"""Text, several texts (of a `jsonl`), or the token ids that stand for one."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Sample:
    """One sample of a shard."""

    key: str
    document: Document | None
    """None: unreadable."""

    reason: str = ""
    """Why it is unreadable."""

    place: Place = UNREADABLE
    """Where its document was read from."""


class SampleUnreadable(Exception):
    """A sample cannot be decoded; the message says why."""


@dataclass(slots=True)
class Group:
    """The members of the sample that is being collected."""

    key: str
    contents: dict[str, bytes] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def endings(self) -> frozenset[str]:
        """The endings of the members that were found."""
        return frozenset([*self.contents, *self.problems, *self.others])


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and ending of a member's name; None: it belongs to no sample."""
    if _META.match(name):
        return None
    match = _NAME.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def read_samples(reader: TarReader, *, text_field: str) -> Iterator[Sample]:
    """Yield the samples of an archive in order, unreadable ones with their reason.

    Raises:
        ShardUnreadable: the archive itself is damaged.
    """
    seen: set[str] = set()
    for group in groups(reader):
        if group.key in seen:
            reason = f"sample {group.key!r}: another sample of the shard has the same key"
            yield Sample(key=group.key, document=None, reason=reason)
        else:
            seen.add(group.key)
            yield sample_of(group, text_field=text_field)


def groups(
    reader: TarReader, *, torn: Callable[[Group], None] = lambda group: None
) -> Iterator[Group]:
    """Yield the samples' members in order.

    `torn` hears of the group that was being collected where the archive turns out to be damaged.

    Raises:
        ShardUnreadable: the archive itself is damaged.
    """
    group: Group | None = None
    try:
        for member in reader:
            parts = split_name(member.name)
            if parts is None:
                continue
            key, ending = parts
            if group is None or group.key != key:
                if group is not None:
                    yield group
                group = Group(key)
            _add(group, ending, member, reader)
    except ShardUnreadable:
        if group is not None:
            torn(group)
        raise
    if group is not None:
        yield group


def _add(group: Group, ending: str, member: Member, reader: TarReader) -> None:
    if ending not in ENDINGS:
        group.others.append(ending)
    elif ending in group.contents or ending in group.problems:
        group.problems[ending] = f"it holds two members that end in .{ending}"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        group.problems[ending] = f"its member {member.name!r} has a name that leads elsewhere"
    elif member.refused:
        group.problems[ending] = (
            f"its member .{ending} is {member.refused}; only regular files are read"
        )
    elif member.size > MAX_MEMBER_BYTES:
        group.problems[ending] = (
            f"its member .{ending} has {member.size} bytes, more than {MAX_MEMBER_BYTES}"
        )
    else:
        group.offsets[ending] = member.offset
        group.contents[ending] = reader.read(member)


def sample_of(group: Group, *, text_field: str, archive_at: int = 0) -> Sample:
    """Decode a sample; its offsets count from `archive_at` in the shard."""
    try:
        ending = _chosen(group)
        content = group.contents[ending]
        document = decode(content, ending, text_field=text_field)
    except SampleUnreadable as error:
        return Sample(key=group.key, document=None, reason=f"sample {group.key!r}: {error}")
    place = Place(
        ending=ending,
        offset=archive_at + group.offsets[ending],
        size=len(content),
        digest=digest_of(content),
    )
    return Sample(key=group.key, document=document, place=place)


def _chosen(group: Group) -> str:
    for ending in ENDINGS:
        if ending in group.problems:
            raise SampleUnreadable(group.problems[ending])
        if ending in group.contents:
            return ending
    known = ", ".join(f".{ending}" for ending in ENDINGS)
    others = ", ".join(repr(ending) for ending in group.others)
    raise SampleUnreadable(f"none of its members ({others}) ends in {known}")


def decode(content: bytes, ending: str, *, text_field: str) -> Document:
    """Return the document in a member.

    Raises:
        SampleUnreadable: there is none.
    """
    if ending == "npy":
        return _from_npy(content)
    if ending in ("u16", "u32"):
        return _from_raw(content, ending)
    if ending == "txt":
        return _from_text(content)
    if ending == "jsonl":
        lines = [line for line in content.splitlines() if line.strip()]
        return tuple(_from_json(line, text_field) for line in lines)
    return _from_json(content, text_field)


def _from_text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleUnreadable(f"its text is not UTF-8 at byte {error.start}") from error


def _from_json(content: bytes, text_field: str) -> str:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleUnreadable(f"its JSON cannot be parsed: {error}") from error
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise SampleUnreadable(
            f"its JSON has no text in the field {text_field!r} (data.text_field)"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleUnreadable(f"its text has half a surrogate pair at {error.start}") from error
    return text


def _from_raw(content: bytes, ending: str) -> NDArray[np.uint32]:
    dtype = np.dtype("<u2") if ending == "u16" else np.dtype("<u4")
    if len(content) % dtype.itemsize:
        raise SampleUnreadable(f"{len(content)} bytes are no whole number of .{ending} token ids")
    return np.frombuffer(content, dtype=dtype).astype(np.uint32)


def _from_npy(content: bytes) -> NDArray[np.uint32]:
    """Decode by header and buffer, so that a claimed shape allocates nothing."""
    length = _NPY_LENGTHS.get(content[:8])
    body_at = 0
    if length is not None and len(content) >= 8 + length.size:
        body_at = 8 + length.size + length.unpack_from(content, 8)[0]
    header = _NPY_HEADER.fullmatch(content[8 + length.size : body_at]) if length else None
    if header is None:
        raise SampleUnreadable("its .npy has no valid header of a plain array")
    shape = tuple(int(size) for size in header[2].replace(b",", b" ").split())
    try:
        dtype = np.dtype(header[1].decode("ascii"))
    except (TypeError, ValueError) as error:
        raise SampleUnreadable(f"its .npy has no valid header: {error}") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise SampleUnreadable(
            f".npy must be a 1-D array of integers, got shape {shape} of type {dtype}"
        )
    body = content[body_at:]
    if len(body) != shape[0] * dtype.itemsize:
        raise SampleUnreadable(f".npy claims {shape[0]} token ids and holds {len(body)} bytes")
    tokens = np.frombuffer(body, dtype=dtype)
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 32):
        raise SampleUnreadable(
            f"token ids must be in 0..2^32-1, got {tokens.min()}..{tokens.max()}"
        )
    return tokens.astype(np.uint32)
