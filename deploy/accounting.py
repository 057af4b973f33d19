"""Was anything lost, doubled or changed? Computed from what trainers received, against the shards.

Nothing here trusts the loader: the sequences that should have come are cut anew from the raw
shards, and the trainers' own logs say what did come.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploy.history import Delivery, History
from protos.planbook import PlanBook
from protos.types import Plan, Step

Place = tuple[int, int, int]
"""Epoch, window and sequence."""

MAX_FAULTS_NAMED = 20


class ExpectedOrder(Protocol):
    """What each lane should get of each domain, computed from the raw shards."""

    def num_windows(self, domain: str, lane: int, epoch: int) -> int:
        """Return how many windows a lane has in an epoch."""

    def window(self, domain: str, lane: int, epoch: int, window: int) -> Sequence[str]:
        """Return the SHA-256 of every sequence of a window, in order."""


@dataclass(slots=True)
class Account:
    """What became of the sequences."""

    num_sequences: int = 0
    """Received, in the steps that count."""

    num_lanes_checked: int = 0
    """Pairs of a lane and a domain."""

    lost: int = 0
    """Places before a lane's newest place that no rank received."""

    duplicated: int = 0
    """Received again, after the first time."""

    mismatched: int = 0
    """Received with other tokens than the shards hold there, or from a place that is none."""

    misordered: int = 0
    """Received after a sequence of the same lane and domain that comes later."""

    faults: list[str] = field(default_factory=list)
    """The first of them, in words."""

    @property
    def clean(self) -> bool:
        """Nothing was lost, doubled, changed or out of order."""
        return not (self.lost or self.duplicated or self.mismatched or self.misordered)

    def note(self, fault: str) -> None:
        """Keep a fault's description, if there are few."""
        if len(self.faults) < MAX_FAULTS_NAMED:
            self.faults.append(fault)


def account_for(history: History, expected: ExpectedOrder) -> Account:
    """Hold every delivered sequence against the place that it came from."""
    account = Account()
    by_lane: dict[tuple[int, str], list[Delivery]] = defaultdict(list)
    for delivery in history.deliveries:
        by_lane[delivery.lane, delivery.domain].append(delivery)
        account.num_sequences += 1
    for (lane, domain), deliveries in sorted(by_lane.items()):
        _check_lane(account, lane, domain, deliveries, expected)
        account.num_lanes_checked += 1
    return account


def _check_lane(
    account: Account, lane: int, domain: str, deliveries: list[Delivery], expected: ExpectedOrder
) -> None:
    where = f"lane {lane}, {domain}"
    for before, after in zip(deliveries, deliveries[1:], strict=False):
        if after.place < before.place:
            account.misordered += 1
            account.note(f"{where}: place {after.place} came after {before.place}")
    received: dict[Place, list[Delivery]] = defaultdict(list)
    for delivery in deliveries:
        received[delivery.place].append(delivery)
    newest = max(received)
    for place, sha256 in _places_through(newest, domain, lane, expected):
        came = received.pop(place, [])
        if not came:
            account.lost += 1
            account.note(f"{where}: place {place} was never received")
        account.duplicated += max(len(came) - 1, 0)
        if len(came) > 1:
            steps = sorted({delivery.step for delivery in came})
            account.note(f"{where}: place {place} was received {len(came)} times, steps {steps}")
        for delivery in came:
            if delivery.sha256 != sha256:
                account.mismatched += 1
                account.note(f"{where}: place {place}, step {delivery.step}: other tokens")
    for place, came in received.items():
        account.mismatched += len(came)
        account.note(f"{where}: place {place} does not exist, step {came[0].step}")


def _places_through(
    newest: Place, domain: str, lane: int, expected: ExpectedOrder
) -> Iterator[tuple[Place, str]]:
    for epoch in range(newest[0] + 1):
        for window in range(expected.num_windows(domain, lane, epoch)):
            if (epoch, window) > newest[:2]:
                return
            for sequence, sha256 in enumerate(expected.window(domain, lane, epoch, window)):
                if (epoch, window, sequence) > newest:
                    return
                yield (epoch, window, sequence), sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class Obedience:
    """How exactly the received steps follow the plans."""

    max_share_error_sequences: float
    """Largest difference, in a step and domain, between what came and share x global_sequences."""

    plans_checked: int
    """Plans of which at least one step was received."""

    disobeyed_steps: tuple[int, ...]
    """Steps whose counts are not those of the plan in force."""

    planned_sequences: dict[str, int]
    delivered_sequences: dict[str, int]

    @property
    def plans_obeyed(self) -> bool:
        """Every step has exactly its plan's counts, so each plan holds from its first step on."""
        return not self.disobeyed_steps


def check_plans(
    history: History,
    plans: Iterable[Plan],
    *,
    domains: Sequence[str],
    global_sequences: int,
    counts_of: Callable[[PlanBook, Step], NDArray[np.int64]] = PlanBook.counts,
) -> Obedience:
    """Hold each step's counts against the plan that was in force.

    `counts_of` says what [domains] counts a step has under the plans.
    """
    book = PlanBook(global_sequences=global_sequences)
    for plan in plans:
        book.add(plan)
    planned_total: Counter[str] = Counter()
    delivered_total: Counter[str] = Counter()
    versions = set()
    disobeyed = []
    max_error = 0.0
    for step in sorted(history.steps):
        came = Counter(delivery.domain for delivery in history.steps[step])
        counts = dict(zip(domains, counts_of(book, Step(step)).tolist(), strict=True))
        plan = book.plan_at(Step(step))
        versions.add(plan.version)
        if came != Counter(counts):
            disobeyed.append(step)
        for domain, share in zip(domains, plan.mixture.shares, strict=True):
            max_error = max(max_error, abs(came[domain] - share * global_sequences))
        planned_total.update(counts)
        delivered_total.update(came)
    return Obedience(
        max_share_error_sequences=max_error,
        plans_checked=len(versions),
        disobeyed_steps=tuple(disobeyed),
        planned_sequences={domain: planned_total[domain] for domain in domains},
        delivered_sequences={domain: delivered_total[domain] for domain in domains},
    )
