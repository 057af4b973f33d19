"""The mixture within bounds that keeps most of a proposal: water-filling, exact in 2^-32.

Clipping and then dividing by the sum pushes shares below their floor again; here the shares that
are not at a bound are scaled by one common factor until all add up to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.types import SHARE_ONE, Mixture

_NOTHING = 2.0**-40
"""A share so small is none; scaling it up would reach numbers that are not finite."""


@dataclass(frozen=True, eq=False, slots=True)
class Bounds:
    """[domains] least and greatest shares, in units of 2^-32."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]

    def hold_a_mixture(self) -> bool:
        """Tell whether some mixture lies within."""
        return bool((self.low <= self.high).all()) and (
            int(self.low.sum()) <= SHARE_ONE <= int(self.high.sum())
        )

    def nearest_to(self, current: NDArray[np.int64], distance: int) -> Bounds:
        """Return the part of these bounds within `distance` of `current`.

        Where a domain has no such part, its bound nearest to `current` is kept.
        """
        return Bounds(
            np.clip(current - distance, self.low, self.high),
            np.clip(current + distance, self.low, self.high),
        )


def within(shares: NDArray[np.float64], bounds: Bounds) -> Mixture:
    """Return the mixture in `bounds` whose free shares stand to one another as in `shares`.

    A share of 0 stays at its lower bound, unless the others cannot take all that is left.
    """
    low, high = bounds.low / SHARE_ONE, bounds.high / SHARE_ONE
    filled = low.copy()
    has_part = shares > _NOTHING
    reach = np.where(has_part, high, low)
    if reach.sum() >= 1:
        filled[has_part] = _scale_into(
            shares[has_part], low[has_part], high[has_part], total=1 - low[~has_part].sum()
        )
    else:
        filled = reach
        rest = ~has_part
        filled[rest] = _scale_into(
            np.ones(rest.sum()), low[rest], high[rest], total=1 - high[has_part].sum()
        )
    return _quantised(filled, bounds)


def _scale_into(
    parts: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    *,
    total: float,
) -> NDArray[np.float64]:
    """Return clip(factor x parts, low, high) for the factor at which it adds up to `total`."""
    # The sum is piecewise linear in the factor and bends only where a share meets a bound.
    bends = np.unique(np.concatenate([[0.0], low / parts, high / parts]))
    sums = np.clip(bends[:, None] * parts, low, high).sum(axis=1)
    after = min(int(np.searchsorted(sums, total)), len(bends) - 1)
    before = max(after - 1, 0)
    rise = sums[after] - sums[before]
    reached = (total - sums[before]) / rise if rise > 0 else 0.0
    factor = bends[before] + min(max(reached, 0.0), 1.0) * (bends[after] - bends[before])
    filled: NDArray[np.float64] = np.clip(factor * parts, low, high)
    return filled


def _quantised(shares: NDArray[np.float64], bounds: Bounds) -> Mixture:
    """Round to 2^-32 with an exact sum, no share beyond its bound."""
    units = np.clip(np.rint(shares * SHARE_ONE).astype(np.int64), bounds.low, bounds.high)
    missing = SHARE_ONE - int(units.sum())
    # What rounding left over goes where there is most room: to shares that are not at a bound.
    while missing:
        room = bounds.high - units if missing > 0 else units - bounds.low
        # A share of 0 in the proposal must not turn into one of 2^-32.
        room = np.where(units > 0, room, 0) if (room[units > 0] > 0).any() else room
        roomiest = int(np.argmax(room))
        moved = min(abs(missing), int(room[roomiest]))
        units[roomiest] += moved if missing > 0 else -moved
        missing += -moved if missing > 0 else moved
    return Mixture(tuple(int(unit) for unit in units))
