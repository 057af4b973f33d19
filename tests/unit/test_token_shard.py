"""Token shards come back as they were written, and damage is always noticed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_workers.convert import Documents
from loader_workers.token_shard import (
    TokenShardDamaged,
    open_token_shard,
    write_token_shard,
)
from protos.errors import NotReady


def _documents(lengths: list[int], *, wide: bool = False) -> Documents:
    offsets = np.zeros(len(lengths) + 1, dtype=np.uint64)
    np.cumsum(lengths, out=offsets[1:])
    total = int(offsets[-1])
    tokens = np.arange(total, dtype=np.uint32) * 70_001
    return Documents(
        offsets=offsets,
        tokens=tokens if wide else tokens.astype(np.uint16),
        unreadable=tuple((n, f"sample {n}: ünreadable") for n in range(0, len(lengths), 3)),
    )


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=20), wide=st.booleans())
def test_a_token_shard_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], wide: bool
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.tokens"
    documents = _documents(lengths, wide=wide)
    write_token_shard(path, documents)
    for verify in (True, False):
        found = open_token_shard(path, verify=verify)
        np.testing.assert_array_equal(found.offsets, documents.offsets.astype(np.int64))
        np.testing.assert_array_equal(found.tokens, documents.tokens)
        assert found.tokens.dtype == documents.tokens.dtype
        assert (found.unreadable, found.lost) == (documents.unreadable, "")
    assert [each.name for each in path.parent.iterdir()] == ["a.tokens"]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_token_shard(path, _documents([3, 0, 7]))
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        with pytest.raises(TokenShardDamaged):
            open_token_shard(path, verify=True)


def test_any_cut_and_any_addition_is_noticed_without_reading_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_token_shard(path, _documents([3, 0, 7]))
    whole = path.read_bytes()
    for damaged in [*(whole[:end] for end in range(len(whole))), whole + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(TokenShardDamaged):
            open_token_shard(path, verify=False)


def test_a_shard_cut_off_while_it_is_open_ends_the_read_and_not_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_token_shard(path, _documents([3, 0, 70_000]))
    held = open_token_shard(path, verify=True)
    assert held.is_unchanged()
    os.truncate(path, path.stat().st_size - 2)
    assert not held.is_unchanged()
    with pytest.raises(NotReady, match=r"somebody changed the token shard .*a\.tokens"):
        _ = held.tokens


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a.tokens"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_token_shard(target, _documents([3]))
    assert [each.name for each in tmp_path.iterdir()] == ["a.tokens"]
