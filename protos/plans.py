"""Mixtures, the plans that they hold by, and the numbers by which all of it is told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NewType

import numpy as np
from numpy.typing import NDArray

Rank = NewType("Rank", int)
Step = NewType("Step", int)
Lane = NewType("Lane", int)
Generation = NewType("Generation", int)

SHARE_ONE = 1 << 32
"""A share of 1, in the units of `Mixture.shares_q32`."""

Places = NDArray[np.uint32]
"""[domains, 3]: epoch, window and sequence of one lane in every domain."""

Cursors = dict[Lane, Places]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The share of the sequences that each domain gets, quantised so that all compute alike."""

    shares_q32: tuple[int, ...]
    """In the order of the run's domains, in units of 2^-32; they add up to exactly 2^32."""

    def __post_init__(self) -> None:
        if not self.shares_q32:
            raise ValueError("a mixture must have at least one domain, got none")
        if min(self.shares_q32) < 0:
            raise ValueError(f"mixture shares must not be negative, got {self.shares_q32}")
        if sum(self.shares_q32) != SHARE_ONE:
            raise ValueError(
                f"mixture shares must add up to 2^32 = {SHARE_ONE}, got {sum(self.shares_q32)}"
            )

    @classmethod
    def from_shares(cls, shares: Sequence[float]) -> Mixture:
        """Scale `shares` to a sum of 1, quantised by largest remainder; a share of 0 stays 0.

        Raises:
            ValueError: if a share is negative or not finite, or all are 0.
        """
        if any(not math.isfinite(share) or share < 0 for share in shares):
            raise ValueError(f"shares must be finite and not negative, got {list(shares)}")
        exact = [Fraction(share) for share in shares]
        total = sum(exact)
        if total <= 0:
            raise ValueError(f"at least one share must be above 0, got {list(shares)}")
        scaled = [share * SHARE_ONE / total for share in exact]
        floors = [share.numerator // share.denominator for share in scaled]
        remainders = [share - floor for share, floor in zip(scaled, floors, strict=True)]
        by_remainder = sorted(range(len(scaled)), key=lambda index: (-remainders[index], index))
        for index in by_remainder[: SHARE_ONE - sum(floors)]:
            floors[index] += 1
        return cls(tuple(floors))

    @classmethod
    def uniform(cls, num_domains: int) -> Mixture:
        """Give every domain the same share."""
        return cls.from_shares([1.0] * num_domains)

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares as fractions of 1."""
        return tuple(share / SHARE_ONE for share in self.shares_q32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A mixture and the first step for which it holds."""

    version: int
    """Grows by one with each plan of a run."""

    first_step: Step
    mixture: Mixture
    carry_q32: tuple[int, ...]
    """Apportionment error carried into `first_step`, in units of 2^-32 sequences, one a domain."""

    def __post_init__(self) -> None:
        if len(self.carry_q32) != len(self.mixture.shares_q32):
            raise ValueError(
                f"a plan carries one error a domain, got {len(self.carry_q32)} "
                f"for {len(self.mixture.shares_q32)} domains"
            )
        if self.version < 0 or self.first_step < 0:
            raise ValueError(
                "version and first_step must not be negative, "
                f"got {self.version}, {self.first_step}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEvent:
    """What a loader worker hears: plans in force from a step on, and how far they are final."""

    generation: Generation
    plans: tuple[Plan, ...]
    """New since the last event, in order of `first_step`."""

    sealed_through: int
    """The plan of every step up to this one is final; -1: none yet."""

    reset: bool = False
    """Forget all plans held: a generation begins at `plans[0].first_step`."""

    epoch: int = 0
    """The controller's number, which grows with each that opens the ledger; 0: it has none."""

    asked: int = 0
    """Number of a question: how far has the worker gone alone? Plans come once a beat has answered
    it. 0: nothing is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AloneSteps:
    """Steps that a worker composed without their seal, because the controller was silent."""

    first_step: Step
    last_step: Step
    plan_version: int
    lanes: tuple[Lane, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.first_step <= self.last_step or not self.lanes:
            raise ValueError(
                f"steps {self.first_step}..{self.last_step} of {len(self.lanes)} lanes cannot have "
                "been composed alone"
            )
