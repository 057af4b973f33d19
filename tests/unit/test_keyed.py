"""Keyed randomness gives the same bits for ever: other bits would be another order of the data."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protos.keyed import permutation, raw_uint64, raw_uint64_many


def test_the_bits_of_a_key_never_change() -> None:
    assert raw_uint64(3, 7, "shards", "web", 0).tolist() == GOLDEN_BITS
    assert permutation(8, 7, "shards", "web", 0).tolist() == GOLDEN_ORDER


@given(size=st.integers(0, 300), key=st.lists(st.integers() | st.text(), max_size=4))
def test_a_permutation_holds_everything_once(size: int, key: list[int | str]) -> None:
    assert sorted(permutation(size, *key)) == list(range(size))


@given(size=st.integers(0, 11), num_keys=st.integers(0, 40), seed=st.integers(0, 2**64))
def test_the_bits_of_many_keys_are_those_of_each(size: int, num_keys: int, seed: int) -> None:
    tails = [(number, f"lane {number % 3}") for number in range(num_keys)]
    together = raw_uint64_many(size, seed, "slots", tails=tails)
    assert together.shape == (num_keys, size)
    for bits, tail in zip(together, tails, strict=True):
        assert bits.tolist() == raw_uint64(size, seed, "slots", *tail).tolist()


def test_keys_that_look_alike_differ() -> None:
    keys: list[tuple[int | str, ...]] = [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("12",)]
    firsts = {int(raw_uint64(1, *key)[0]) for key in keys}
    assert len(firsts) == len(keys)


def test_order_is_uniform_enough() -> None:
    firsts = np.bincount([permutation(4, 1, "x", n)[0] for n in range(4000)], minlength=4)
    assert np.abs(firsts - 1000).max() < 140


GOLDEN_BITS = [13043387253031740784, 1758387703546051875, 2544120193533582240]
GOLDEN_ORDER = [5, 1, 2, 7, 3, 4, 6, 0]
