"""Windows joined in memory: the same sequences as gathered ones, within a budget of bytes."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from loader_workers.convert import Documents
from loader_workers.index import build_index
from loader_workers.lane import LaneReader
from loader_workers.order import WindowSamples
from loader_workers.token_shard import TokenShard
from loader_workers.window import Window
from loader_workers.window_memory import WindowMemory
from protos.errors import NotReady
from protos.types import Lane
from tests.fakes_loader import make_source, make_spec, write_token_shards

_U16 = np.dtype("<u2")


def _shard(*lengths: int) -> TokenShard:
    offsets = np.cumsum([0, *lengths]).astype("<u8")
    tokens = np.arange(1, int(offsets[-1]) + 1, dtype=_U16)
    return TokenShard(Documents(offsets=offsets, tokens=tokens, unreadable=()))


def _window(shards: Mapping[int, TokenShard], *, sequence_length: int = 4) -> Window:
    places = [(at, n) for at, shard in shards.items() for n in range(len(shard.offsets) - 1)]
    samples = WindowSamples(
        shards=np.array([at for at, _ in places]), samples=np.array([n for _, n in places])
    )
    return Window(
        samples,
        shards,
        sequence_length=sequence_length,
        packing="concatenate",
        eot_id=0,
        dtype=_U16,
    )


@pytest.mark.parametrize("lengths", [(3, 0, 9, 1), (1,), (0, 0), (4, 4), (17,)])
def test_a_joined_window_gives_what_a_gathered_one_gives(lengths: tuple[int, ...]) -> None:
    shards = {0: _shard(*lengths), 3: _shard(5, 2)}
    window = _window(shards)
    every = np.arange(window.num_sequences)[::-1].copy()
    gathered = window.gather(every, lambda: shards)
    window.join(shards)
    joined = window.gather(every, lambda: {})
    for one, other in zip(gathered, joined, strict=True):
        np.testing.assert_array_equal(one, other)
    window.part()
    np.testing.assert_array_equal(window.gather(every, lambda: shards)[0], gathered[0])


def test_a_window_without_tokens_can_be_joined() -> None:
    shards = {0: _shard(0, 0)}
    window = _window(shards)
    window.join(shards)
    assert window.num_sequences == 0
    assert len(window.gather(np.arange(0), lambda: shards)[0]) == 0


def test_a_shard_that_is_not_what_it_was_is_noticed_and_the_stream_must_be_opened_again() -> None:
    window = _window({0: _shard(6, 6)})
    shorter = {0: _shard(6)}
    with pytest.raises(NotReady, match="changed under an open window"):
        window.gather(np.arange(window.num_sequences), lambda: shorter)
    with pytest.raises(NotReady, match="changed under an open window"):
        window.join(shorter)


def test_a_shard_that_lost_a_document_gives_no_other_document_in_its_place() -> None:
    window = _window({0: _shard(6, 6, 6)})
    lost = {0: _shard(6, 0, 6)}
    for sequence in range(window.num_sequences):
        with pytest.raises(NotReady, match="changed under an open window"):
            window.gather(np.array([sequence]), lambda: lost)


def test_the_window_used_longest_ago_makes_room() -> None:
    shards = {0: _shard(40)}
    windows = [_window(shards) for _ in range(3)]
    memory = WindowMemory(budget_bytes=2 * windows[0].joined_bytes)

    def join(window: Window) -> bool:
        return memory.join(window, lambda: window.join(shards))

    assert join(windows[0])
    assert join(windows[1])
    memory.used(windows[0])
    assert join(windows[2])
    assert [window.is_joined for window in windows] == [True, False, True]
    assert memory.num_bytes == 2 * windows[0].joined_bytes
    del windows[0]
    gc.collect()
    assert memory.num_bytes == windows[0].joined_bytes


def test_a_window_larger_than_the_budget_is_not_joined() -> None:
    shards = {0: _shard(40)}
    window = _window(shards)
    memory = WindowMemory(budget_bytes=window.joined_bytes - 1)
    assert not memory.join(window, lambda: window.join(shards))
    assert not window.is_joined
    assert memory.num_bytes == 0


def test_the_budget_changes_no_sequence(tmp_path: Path) -> None:
    lengths = [[7, 0, 31, 5, 12, 9], [3, 3, 60, 1], [18, 2, 2, 2, 2, 25]]
    pattern = write_token_shards(tmp_path, "web", lengths)
    index = build_index({"web": (pattern,)}, text_field="text", max_bad_share=0.0)
    spec = make_spec(index, lanes=2, global_sequences=4, sequence_length=8)
    delivered = []
    for window_bytes in (0, 200, 1 << 20):
        with make_source(spec, index, tmp_path / "cache", window_bytes=window_bytes) as source:
            reader = LaneReader(source, Lane(1), np.zeros((1, 3), np.uint32))
            delivered.append(np.concatenate([reader.take(0, 3).tokens for _ in range(20)]))
    np.testing.assert_array_equal(delivered[0], delivered[1])
    np.testing.assert_array_equal(delivered[0], delivered[2])
