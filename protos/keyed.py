"""Counter-based randomness: every draw is a function of its key, none of what was drawn before.

Only raw Philox output is used. numpy promises that the bits of a bit generator stay the same from
version to version, but promises nothing of the kind for `Generator.permutation` and its like.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def raw_uint64(size: int, *key: int | str) -> NDArray[np.uint64]:
    """Return `size` uniform uint64 numbers that depend on `key` alone."""
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    philox = np.random.Philox(key=np.frombuffer(digest.digest(), dtype="<u8"))
    return np.asarray(philox.random_raw(size), dtype=np.uint64)


def permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of 0..size-1 that depends on `key` alone."""
    return np.argsort(raw_uint64(size, *key), kind="stable").astype(np.int64, copy=False)
