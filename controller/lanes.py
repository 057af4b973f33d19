"""Which worker serves which lane: even, with as few moves as that takes, and not at every blink."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from protos.types import Lane

SETTLE_S = 1.0
"""Lanes that are served move only after no worker has come or gone for so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a worker stands when lanes are given out."""

    capacity: int
    """Lanes that it can serve."""

    unwilling: bool = False
    """It is starting or leaving: it gives its lanes away as soon as others can take them."""

    absent: bool = False
    """It has not been heard of for a moment: it keeps its lanes and gets none."""


def fill(
    shares: Mapping[str, int],
    capacities: Mapping[str, int],
    num_lanes: int,
    *,
    held: Mapping[str, int],
) -> dict[str, int]:
    """Return `shares` after so many lanes more, each given to the worker that then has fewest.

    Where that leaves a choice it is the one that holds most already, then the first by name. When
    all are full, lanes are left over.
    """
    filled = {name: shares.get(name, 0) for name in capacities}
    heap = [
        (share, -held.get(name, 0), name)
        for name, share in filled.items()
        if share < capacities[name]
    ]
    heapq.heapify(heap)
    for _ in range(num_lanes):
        if not heap:
            break
        _, minus_held, name = heapq.heappop(heap)
        filled[name] += 1
        if filled[name] < capacities[name]:
            heapq.heappush(heap, (filled[name], minus_held, name))
    return filled


def assign(
    owners: Mapping[Lane, str], standings: Mapping[str, Standing], lanes: int, *, balance: bool
) -> dict[Lane, str]:
    """Return who serves each lane from now on; lanes that nobody can take are left out.

    Lanes without a worker and those of unwilling workers go to the others at once. Others move only
    if `balance` says so, and only as many as an even division takes. What is given out goes in
    contiguous groups to the workers in the order of their names.
    """
    stays = {name: each for name, each in standings.items() if not each.unwilling}
    kept = {lane: name for lane, name in owners.items() if name in stays}
    held = Counter(kept.values())
    if balance:
        capacities = {
            name: held[name] if each.absent else each.capacity for name, each in stays.items()
        }
        shares = fill({}, capacities, lanes, held=held)
        kept = _within(kept, shares)
    else:
        present = {name: each.capacity for name, each in stays.items() if not each.absent}
        shares = fill(held, present, lanes - len(kept), held=held)
    result = dict(kept)
    have = Counter(kept.values())
    free = [Lane(lane) for lane in range(lanes) if lane not in kept]
    for name in sorted(shares):
        room = 0 if stays[name].absent else max(shares[name] - have[name], 0)
        result.update(dict.fromkeys(free[:room], name))
        free = free[room:]
    # An unwilling worker keeps what nobody else can take.
    result.update({lane: owners[lane] for lane in free if owners.get(lane) in standings})
    return dict(sorted(result.items()))


def _within(kept: Mapping[Lane, str], shares: Mapping[str, int]) -> dict[Lane, str]:
    """Return what each worker keeps of its lanes: the first ones, as many as its share."""
    have: Counter[str] = Counter()
    result = {}
    for lane, name in sorted(kept.items()):
        if have[name] < shares[name]:
            have[name] += 1
            result[lane] = name
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """Lanes that went from one worker to another, for the ledger."""

    num_lanes: int
    lanes_after: Mapping[str, int]
    """How many lanes each worker has now."""


class LaneTable:
    """Who serves each lane. Before anybody was told, it is made anew at every change."""

    def __init__(self, lanes: int, *, now: Callable[[], float], settle_s: float = SETTLE_S) -> None:
        self._lanes = lanes
        self._now = now
        self._settle_s = settle_s
        self._was_told = False
        self._members: frozenset[tuple[str, bool, bool]] = frozenset()
        self._changed_s = now()
        self.owners: dict[Lane, str] = {}
        self.version = 1
        """Grows whenever a lane is served elsewhere."""

        self.num_moved = 0
        """Lanes that went from one worker to another, in all."""

    @property
    def is_complete(self) -> bool:
        """Whether every lane has a worker."""
        return len(self.owners) == self._lanes

    def told(self) -> None:
        """Note that ranks have been told: from now on lanes stay where they are if they can."""
        self._was_told = True

    def moved_house(self) -> None:
        """Note that a worker serves its lanes at another address."""
        self.version += 1

    def update(self, standings: Mapping[str, Standing]) -> Moves | None:
        """Bring the table to the workers that there are; return what moved, if something did."""
        members = frozenset((name, each.unwilling, each.absent) for name, each in standings.items())
        if members != self._members:
            self._members, self._changed_s = members, self._now()
        is_calm = self._now() - self._changed_s >= self._settle_s and not any(
            each.absent for each in standings.values()
        )
        before = self.owners if self._was_told else {}
        after = assign(before, standings, self._lanes, balance=is_calm or not self._was_told)
        if after == self.owners:
            return None
        moved = sum(before.get(lane, name) != name for lane, name in after.items())
        self.owners = after
        self.version += 1
        self.num_moved += moved
        return Moves(num_lanes=moved, lanes_after=Counter(after.values())) if moved else None
