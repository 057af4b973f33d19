"""The laws of an epoch's order: which lane owns which samples, and what a window trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loader_workers.order import EpochOrder, NumberedShards, OrderKey, num_sequences


def _orders(
    sizes: Sequence[int], *, lanes: int, interleave: int, window_samples: int, epoch: int
) -> list[EpochOrder]:
    numbered = NumberedShards(3, "web", epoch, shard_samples=np.array(sizes))
    return [
        EpochOrder(
            OrderKey(
                seed=3,
                domain="web",
                lane=lane,
                lanes=lanes,
                window_samples=window_samples,
                interleave=interleave,
            ),
            epoch=epoch,
            numbered=numbered,
        )
        for lane in range(lanes)
    ]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    lanes=st.integers(1, 9),
    interleave=st.integers(1, 5),
    per_part=st.integers(1, 7),
    epoch=st.integers(0, 3),
)
def test_every_sample_stands_in_exactly_one_window_of_one_lane(
    sizes: list[int], lanes: int, interleave: int, per_part: int, epoch: int
) -> None:
    orders = _orders(
        sizes,
        lanes=lanes,
        interleave=interleave,
        window_samples=interleave * per_part,
        epoch=epoch,
    )
    seen: Counter[tuple[int, int]] = Counter()
    for order in orders:
        for window in range(order.num_windows):
            found = order.window(window)
            assert len(found.samples) <= interleave * per_part
            seen.update(zip(found.shards.tolist(), found.samples.tolist(), strict=True))
    assert seen == Counter(
        (shard, sample) for shard, size in enumerate(sizes) for sample in range(size)
    )


@given(sizes=st.lists(st.integers(1, 20), min_size=20, max_size=40), lanes=st.integers(2, 8))
def test_a_lane_touches_its_share_of_the_shards_and_few_more(sizes: list[int], lanes: int) -> None:
    orders = _orders(sizes, lanes=lanes, interleave=4, window_samples=8, epoch=0)
    touched = [
        {shard for w in range(order.num_windows) for shard in order.window(w).shards.tolist()}
        for order in orders
    ]
    # Neighbours share at most the shard that their common border cuts.
    assert sum(map(len, touched)) <= len(sizes) + lanes - 1


def test_epochs_lanes_and_seeds_give_other_orders() -> None:
    first, second = (
        _orders([50] * 4, lanes=2, interleave=2, window_samples=100, epoch=epoch)[0].window(0)
        for epoch in (0, 1)
    )
    assert first.samples.tolist() != second.samples.tolist()


@given(num_tokens=st.integers(0, 500), length=st.integers(1, 40))
def test_sequences_train_on_every_token_but_the_first_once(num_tokens: int, length: int) -> None:
    count = num_sequences(num_tokens, sequence_length=length)
    trained = [
        token
        for sequence in range(count)
        for token in range(sequence * length + 1, min((sequence + 1) * length + 1, num_tokens))
    ]
    assert trained == list(range(1, num_tokens))
    assert count == (0 if num_tokens == 0 else max(1, count))
    assert count <= 1 or (count - 1) * length + 1 < num_tokens
