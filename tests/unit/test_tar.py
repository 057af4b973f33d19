"""The tar reader reads what webdataset writes, and takes no damage for the end."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_workers.samples import read_samples
from loader_workers.tar import BLOCK, Member, TarReader
from loader_workers.tar_header import parse_usual
from protos.errors import ShardUnreadable
from tests.fakes_loader import shard_bytes

FORMATS = ["USTAR_FORMAT", "PAX_FORMAT", "GNU_FORMAT"]


def _members(data: bytes) -> list[Member]:
    return list(TarReader(io.BytesIO(data), num_bytes=len(data), shard="web/0.tar"))


def _documents(data: bytes) -> list[object]:
    reader = TarReader(io.BytesIO(data), num_bytes=len(data), shard="web/0.tar")
    return [sample.document or sample.reason for sample in read_samples(reader, text_field="text")]


def _archive(add: Callable[[tarfile.TarFile], None]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        _add(archive, "first.txt", b"one")
        add(archive)
        _add(archive, "last.txt", b"two")
    return sink.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _small_shard() -> bytes:
    return shard_bytes([{"__key__": f"{n:03d}", "txt": f"text {n} " * 40} for n in range(8)])


@pytest.mark.parametrize("tar_format", FORMATS)
def test_it_reads_what_webdataset_writes(tar_format: str) -> None:
    data = shard_bytes(
        [
            {"__key__": "a/b", "txt": "hello"},
            {"__key__": "d" * 40 + "/" + "x" * 90, "json": '{"text": "long name"}'},
            {"__key__": "c", "txt": ""},
        ],
        tar_format=tar_format,
    )
    assert [member.name for member in _members(data)] == [
        "a/b.txt",
        "d" * 40 + "/" + "x" * 90 + ".json",
        "c.txt",
    ]
    assert _documents(data)[:2] == ["hello", "long name"]


def test_it_reads_pax_headers_of_path_and_size() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("ключ/" + "n" * 300 + ".txt")
        info.size, info.mtime = 5, 1.5
        archive.addfile(info, io.BytesIO(b"hello"))
    data = sink.getvalue()
    (member,) = _members(data)
    assert member.name == "ключ/" + "n" * 300 + ".txt"
    assert data[member.offset : member.offset + member.size] == b"hello"


def test_global_headers_and_folders_are_passed_over() -> None:
    sink = io.BytesIO()
    with tarfile.open(
        fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}
    ) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        _add(archive, "folder/a.txt", b"hello")
    assert [member.name for member in _members(sink.getvalue())] == ["folder/a.txt"]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a named pipe"),
    ],
)
def test_what_is_not_a_regular_file_is_refused_and_the_rest_is_read(kind: bytes, what: str) -> None:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("evil.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)

    first, evil, last = _documents(_archive(add))
    assert (first, last) == ("one", "two")
    assert evil == f"sample 'evil': its member .txt is {what}; only regular files are read"


@pytest.mark.parametrize("name", ["../../etc/evil.txt", "a/../../evil.txt", "/etc/evil.txt"])
def test_names_that_lead_elsewhere_are_refused_and_the_rest_is_read(name: str) -> None:
    data = _archive(lambda archive: _add(archive, name, b"text"))
    first, evil, last = _documents(data)
    assert (first, last) == ("one", "two")
    assert str(evil).endswith(f"its member {name!r} has a name that leads elsewhere")


def test_a_key_that_comes_again_is_refused() -> None:
    def add(archive: tarfile.TarFile) -> None:
        _add(archive, "b.txt", b"x")
        _add(archive, "first.txt", b"y")

    data = _archive(add)
    assert _documents(data) == [
        "one",
        "x",
        "sample 'first': another sample of the shard has the same key",
        "two",
    ]


def test_a_truncated_archive_is_damage_wherever_it_is_cut() -> None:
    data = _small_shard()
    content_end = len(data.rstrip(b"\0"))
    for end in [*range(0, content_end, 64), content_end, content_end + BLOCK]:
        with pytest.raises(ShardUnreadable, match=r"web/0.tar: .* \(at byte \d+\)"):
            _members(data[:end])


@given(position=st.integers(0, BLOCK - 1), member=st.integers(0, 7), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_header_is_damage(position: int, member: int, flip: int) -> None:
    data = bytearray(_small_shard())
    at = _members(bytes(data))[member].offset - BLOCK + position
    data[at] ^= flip
    try:
        names = [each.name for each in _members(bytes(data))]
    except ShardUnreadable:
        return
    # The one change that no checksum sees is to how the checksum itself is written.
    assert 148 <= position < 156
    assert names == [f"{n:03d}.txt" for n in range(8)]


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_hole_of_zeros_over_a_header_is_damage(num_blocks: int) -> None:
    data = bytearray(_small_shard())
    at = _members(bytes(data))[4].offset - BLOCK
    data[at : at + num_blocks * BLOCK] = bytes(num_blocks * BLOCK)
    with pytest.raises(ShardUnreadable, match=r"zeros|end-of-archive"):
        _members(bytes(data))


def test_a_hole_of_zeros_up_to_the_end_is_damage() -> None:
    data = bytearray(shard_bytes([{"__key__": str(n), "txt": "t" * 200_000} for n in range(10)]))
    at = _members(bytes(data))[2].offset - BLOCK
    data[at:] = bytes(len(data) - at)
    with pytest.raises(ShardUnreadable, match="bytes before the end"):
        _members(bytes(data))


def test_an_archive_after_the_end_of_another_is_damage() -> None:
    with pytest.raises(ShardUnreadable, match="data follows the end-of-archive mark"):
        _members(_small_shard() * 2)


def test_a_member_larger_than_the_file_is_damage() -> None:
    info = tarfile.TarInfo("huge.txt")
    info.size = 100 << 30
    data = info.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048
    with pytest.raises(ShardUnreadable, match=r"'huge.txt' claims 107374182400 bytes, 2048 are"):
        _members(data)


def test_a_negative_size_is_damage() -> None:
    info = tarfile.TarInfo("odd.txt")
    info.size = -512
    with pytest.raises(ShardUnreadable, match="claims -512 bytes"):
        _members(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))


def test_a_huge_extended_header_is_damage() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with pytest.raises(ShardUnreadable, match="an extended header claims 1073741824 bytes"):
        _members(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2048))


@pytest.mark.parametrize("record", [b"99 path=a\n", b"x path=a\n", b"9 pathaa\n", b"0 path=a\n"])
def test_a_malformed_pax_record_is_damage(record: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0") + _small_shard()
    with pytest.raises(ShardUnreadable, match="PAX record"):
        _members(data)


def test_a_sparse_member_is_damage() -> None:
    info = tarfile.TarInfo("holes.txt")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(ShardUnreadable, match=r"'holes.txt' is a sparse file"):
        _members(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))


def test_a_compressed_shard_is_named_as_one() -> None:
    with pytest.raises(ShardUnreadable, match=r"is it compressed\? unpack it"):
        _members(b"\x1f\x8b\x08" + bytes(range(256)) * 4)


@given(data=st.binary(max_size=3000))
def test_no_bytes_make_it_fail_in_another_way(data: bytes) -> None:
    with pytest.raises(ShardUnreadable):
        _members(data)


_FORMATS: tuple[Literal[0, 1, 2], ...] = (
    tarfile.USTAR_FORMAT,
    tarfile.GNU_FORMAT,
    tarfile.PAX_FORMAT,
)


@given(
    name=st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=180),
    size=st.integers(0, 1 << 34),
    tar_format=st.sampled_from(_FORMATS),
    type_=st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]),
    change=st.none() | st.tuples(st.integers(0, BLOCK - 1), st.integers(1, 255)),
)
def test_usual_headers_are_parsed_as_tarfile_parses_them(
    name: str, size: int, tar_format: Literal[0, 1, 2], type_: bytes, change: tuple[int, int] | None
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mtime = size, type_, 1_700_000_000.5
    try:
        blocks = bytearray(info.tobuf(tar_format, "utf-8", "surrogateescape"))
    except ValueError:
        return  # this format cannot hold that name or size
    if change is not None:
        blocks[change[0]] ^= change[1]
    for at in range(0, len(blocks), BLOCK):
        header = bytes(blocks[at : at + BLOCK])
        usual = parse_usual(header)
        try:
            expected = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            assert usual is None
            continue
        if usual is not None:
            assert usual == (expected.name, expected.size, expected.type)


def test_what_webdataset_and_tarfile_write_is_usual() -> None:
    info = tarfile.TarInfo("000001.txt")
    info.size, info.mtime = 100, 1_700_000_000.5
    pax = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    headers = [pax[at : at + BLOCK] for at in (0, 2 * BLOCK)]
    assert [(usual.type, usual.size) for usual in map(parse_usual, headers) if usual] == [
        (tarfile.XHDTYPE, 22),
        (tarfile.REGTYPE, 100),
    ]
