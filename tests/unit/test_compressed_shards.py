"""Compressed shards, and shards that were made to do harm."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from loader_workers import streams
from loader_workers.index import build_index
from loader_workers.samples import Sample, read_samples
from loader_workers.shard_file import open_shard
from protos.errors import ShardUnreadable
from tests.fakes_loader import npy_bytes, shard_bytes

DATA = shard_bytes([{"__key__": f"{n:03d}", "txt": f"text {n} " * 40} for n in range(30)])


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "x.tar.gz": _gzip,
    "x.tgz": _gzip,
    "X.TAR.GZ": _gzip,
    "x.tar.zst": _zstd,
    "x.tar.zstd": _zstd,
    "x.tar": bytes,
}


def _samples(path: Path) -> list[Sample]:
    with open_shard(str(path)) as shard:
        found = list(read_samples(shard.members, text_field="text"))
        shard.sha256()
    return found


@pytest.mark.parametrize("name", PACKERS)
def test_every_form_of_shard_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PACKERS[name](DATA))
    assert [sample.document for sample in _samples(tmp_path / name)] == [
        f"text {n} " * 40 for n in range(30)
    ]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst"])
def test_several_frames_one_after_the_other_are_one_archive(tmp_path: Path, name: str) -> None:
    pack = PACKERS[name]
    (tmp_path / name).write_bytes(pack(DATA[:5000]) + pack(DATA[5000:]))
    assert len(_samples(tmp_path / name)) == 30


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst"])
def test_a_compressed_shard_that_is_cut_off_is_damage(tmp_path: Path, name: str) -> None:
    whole = PACKERS[name](DATA)
    for end in range(0, len(whole) - 8, 17):
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(ShardUnreadable):
            _samples(tmp_path / name)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst"])
def test_what_is_not_compressed_though_its_name_says_so_is_damage(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(DATA)
    with pytest.raises(ShardUnreadable, match="its compressed data is damaged or cut off"):
        _samples(tmp_path / name)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst"])
def test_a_bomb_is_given_up_before_it_fills_the_memory(tmp_path: Path, name: str) -> None:
    info = tarfile.TarInfo("bomb.bin")
    info.size = 300 << 20
    inner = info.tobuf(tarfile.GNU_FORMAT) + bytes(info.size + 1024)
    (tmp_path / name).write_bytes(PACKERS[name](inner))
    assert (tmp_path / name).stat().st_size < 1 << 20
    del inner
    tracemalloc.start()
    with pytest.raises(ShardUnreadable, match=r"expand to more than .* \(a bomb\?"):
        _samples(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_a_zstandard_stream_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.tar.zst").write_bytes(packer.compress(DATA) + packer.flush())
    with pytest.raises(ShardUnreadable, match="too much memory"):
        _samples(tmp_path / "x.tar.zst")


def test_a_member_of_100_gb_in_a_compressed_shard_is_damage(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.txt")
    info.size = 100 << 30
    (tmp_path / "x.tgz").write_bytes(_gzip(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    with pytest.raises(ShardUnreadable, match="'huge.txt' claims 107374182400 bytes"):
        _samples(tmp_path / "x.tgz")


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "ending",
    ["pkl", "pyd", "pickle", "pth", "pt", "npy", "npz", "txt", "json", "jsonl", "u16", "x"],
)
def test_a_pickle_is_never_loaded_whatever_its_name(
    tmp_path: Path, ending: str, protocol: int
) -> None:
    marker = tmp_path / "marker"
    evil = pickle.dumps(_Evil(marker), protocol=protocol)
    members: list[dict[str, bytes | str]] = [
        {"__key__": "evil", ending: evil},
        {"__key__": "good", "txt": "fine"},
    ]
    (tmp_path / "x.tar").write_bytes(shard_bytes(members))
    found, last = _samples(tmp_path / "x.tar")
    assert last.document == "fine"
    assert not marker.exists()
    # Old pickles are plain text and any bytes are token ids: they are data here, and nothing else.
    assert found.reason or ending in ("txt", "u16")


def test_an_npy_of_objects_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    sink = io.BytesIO()
    np.save(sink, np.array([_Evil(marker)], dtype=object), allow_pickle=True)
    (tmp_path / "x.tar").write_bytes(shard_bytes([{"__key__": "evil", "npy": sink.getvalue()}]))
    (found,) = _samples(tmp_path / "x.tar")
    assert ".npy must be a 1-D array of integers" in found.reason
    assert not marker.exists()


def test_an_archive_within_an_archive_is_not_opened(tmp_path: Path) -> None:
    inner = shard_bytes([{"__key__": "in", "txt": "hidden"}])
    (tmp_path / "x.tar").write_bytes(shard_bytes([{"__key__": "out", "tar": inner}]))
    (found,) = _samples(tmp_path / "x.tar")
    assert "none of its members ('tar') ends in" in found.reason


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_error_that_passes_costs_nothing_and_one_that_stays_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "x.tar").write_bytes(DATA)
    pread, failures = os.pread, [2]

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(number, os.strerror(number))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert len(_samples(tmp_path / "x.tar")) == 30
    assert failures == [0]
    failures[0] = streams.LOCAL_TRIES
    with pytest.raises(ShardUnreadable, match=os.strerror(number)):
        _samples(tmp_path / "x.tar")
    assert failures == [0]


def test_arrays_of_token_ids_in_a_compressed_shard_need_no_tokenizer(tmp_path: Path) -> None:
    ids = np.arange(50)
    members: list[dict[str, bytes | str]] = [
        {"__key__": "a", "npy": npy_bytes(ids)},
        {"__key__": "b", "u16": ids.astype("<u2").tobytes()},
        {"__key__": "c", "u32": ids.astype("<u4").tobytes()},
    ]
    (tmp_path / "x.tar.zst").write_bytes(_zstd(shard_bytes(members)))
    index = build_index({"web": [str(tmp_path / "x.tar.zst")]}, text_field="text", max_bad_share=0)
    (shard,) = index.shards("web")
    assert (shard.format, shard.text_bytes, shard.num_samples) == ("tokens", 600, 3)
