"""How often a call that may be repeated is repeated, and how long between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from protos.errors import Retryable

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Waits that grow, each drawn from [half, whole] so that ranks do not knock in step."""

    first_wait_s: float = 0.1
    growth: float = 2.0
    max_wait_s: float = 3.0

    def wait_s(self, num_tries: int) -> float:
        """Return how long to wait after `num_tries` failures in a row."""
        grown = self.first_wait_s * self.growth ** min(num_tries - 1, 30)
        return min(grown, self.max_wait_s) * random.uniform(0.5, 1.0)


def until_answered(
    call: Callable[[float], T],
    *,
    budget_s: float,
    retry: Retry,
    wait: Callable[[float], object],
    now: Callable[[], float] = time.monotonic,
) -> T:
    """Make `call` until it is answered or the time is over.

    Args:
        call: gets the seconds that are left; may be repeated.
        budget_s: seconds for all tries together; the first try is always made.
        retry: how long to wait between tries.
        wait: waits so many seconds, or less if nobody wants the answer any more.
        now: seconds, growing.

    Raises:
        Retryable: the last try's error, when no time is left for another.
        HeadraceError: whatever else `call` raises, at once.
    """
    deadline = now() + budget_s
    num_tries = 0
    while True:
        try:
            return call(max(deadline - now(), 0.0))
        except Retryable:
            num_tries += 1
            wait_s = retry.wait_s(num_tries)
            if now() + wait_s >= deadline:
                raise
            wait(wait_s)
