"""How many sequences of each domain a step gets: largest remainder with carried error, in integers.

In every step a domain gets the floor or the ceiling of share x global_sequences, a share of 0 gets
0, and the carried error keeps the sum over any run of steps close to what was planned: within
1 + ln(domains) sequences, whatever the policy does (the multiprocessor cup game).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protos.types import SHARE_ONE, Mixture

Carry = NDArray[np.int64]
"""[domains]: planned minus delivered so far, in units of 2^-32 sequences; adds up to 0."""

MAX_GLOBAL_SEQUENCES = 1 << 24
"""Keeps share x global_sequences plus any carry well inside an int64."""


def apportion(
    mixture: Mixture, *, global_sequences: int, carry: Carry
) -> tuple[NDArray[np.int64], Carry]:
    """Return the step's [domains] counts, adding up to `global_sequences`, and the carry after it.

    Among the domains with a fraction of a sequence due, those with the largest carry plus fraction
    get one more; ties go by domain order.
    """
    return Apportionment(mixture, global_sequences=global_sequences).step(carry)


class Apportionment:
    """What is the same for all steps under one mixture."""

    def __init__(self, mixture: Mixture, *, global_sequences: int) -> None:
        if not 1 <= global_sequences <= MAX_GLOBAL_SEQUENCES:
            raise ValueError(
                f"global_sequences must be in 1..{MAX_GLOBAL_SEQUENCES}, got {global_sequences}"
            )
        self.mixture = mixture
        due = np.asarray(mixture.shares_q32, dtype=np.int64) * global_sequences
        self._floors, self._fractions = np.divmod(due, SHARE_ONE)
        self._num_left = global_sequences - int(self._floors.sum())
        self._candidates = np.flatnonzero(self._fractions)

    def step(self, carry: Carry) -> tuple[NDArray[np.int64], Carry]:
        """Return a step's [domains] counts and the carry after it; see `apportion`."""
        due = carry + self._fractions
        by_claim = np.argsort(-due[self._candidates], kind="stable")
        one_more = self._candidates[by_claim[: self._num_left]]
        counts = self._floors.copy()
        counts[one_more] += 1
        due[one_more] -= SHARE_ONE
        return counts, due


def no_carry(num_domains: int) -> Carry:
    """Return the carry before the first step of a run."""
    return np.zeros(num_domains, dtype=np.int64)
