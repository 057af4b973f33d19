"""Counter-based randomness: every draw is a function of its key, none of what was drawn before.

Only raw Philox output is used. numpy promises that the bits of a bit generator stay the same from
version to version, but promises nothing of the kind for `Generator.permutation` and its like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_WORTH_IT = 16
"""With fewer keys numpy's own Philox, one after the other, takes less time."""

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def raw_uint64(size: int, *key: int | str) -> NDArray[np.uint64]:
    """Return `size` uniform uint64 numbers that depend on `key` alone."""
    philox = np.random.Philox(key=np.frombuffer(_digest(_begin, key), dtype="<u8"))
    return np.asarray(philox.random_raw(size), dtype=np.uint64)


def raw_uint64_many(
    size: int, *key: int | str, tails: Sequence[tuple[int | str, ...]]
) -> NDArray[np.uint64]:
    """Return [tails, size]: what `raw_uint64` returns for `key` with each of `tails` after it."""
    if len(tails) < _WORTH_IT:
        rows = [raw_uint64(size, *key, *tail) for tail in tails]
        return np.stack(rows) if rows else np.empty((0, size), dtype=np.uint64)
    begun = _begin()
    _feed(begun, key)
    digests = b"".join(_digest(begun.copy, tail) for tail in tails)
    return _philox(np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64), size)


def _begin() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


def _digest(begin: Callable[[], _Hash], key: tuple[int | str, ...]) -> bytes:
    digest = begin()
    _feed(digest, key)
    return digest.digest()


def _feed(digest: _Hash, key: tuple[int | str, ...]) -> None:
    for part in key:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)


def _philox(keys: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Return [keys, size]: what numpy's Philox4x64 gives for each of [keys, 2], all at once.

    Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3". numpy counts up before it
    draws, so that the first block is that of counter 1.
    """
    num_blocks = -(-size // 4)
    x0 = np.tile(np.arange(1, num_blocks + 1, dtype=np.uint64), (len(keys), 1))
    x1 = x2 = x3 = np.zeros_like(x0)
    bumped = keys
    for _ in range(_ROUNDS):
        high0, low0 = _multiplied(x0, _MULTIPLIERS[0])
        high1, low1 = _multiplied(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ bumped[:, :1], low1, high0 ^ x3 ^ bumped[:, 1:], low0
        bumped = bumped + _WEYL
    return np.stack([x0, x1, x2, x3], axis=2).reshape(len(keys), -1)[:, :size]


def _multiplied(
    a: NDArray[np.uint64], b: np.uint64
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the high and the low 64 bits of a product."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    carried = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (carried >> _HALF), a * b


def permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of 0..size-1 that depends on `key` alone."""
    return np.argsort(raw_uint64(size, *key), kind="stable").astype(np.int64, copy=False)
