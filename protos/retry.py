"""How long to wait before a call that may be repeated is repeated."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Waits that grow, each drawn from [half, whole] so that callers do not knock in step."""

    first_wait_s: float = 0.1
    growth: float = 2.0
    max_wait_s: float = 5.0

    def wait_s(self, num_tries: int) -> float:
        """Return how long to wait after `num_tries` failures in a row."""
        grown = self.first_wait_s * self.growth ** min(num_tries - 1, 30)
        return min(grown, self.max_wait_s) * random.uniform(0.5, 1.0)
