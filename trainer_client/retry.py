"""Calls that may be repeated, repeated until they are answered or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from protos.errors import Retryable
from protos.retry import Retry

T = TypeVar("T")


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
        wait: waits so many seconds, or less and returns True if nobody wants the answer any more.
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
            if now() + wait_s >= deadline or wait(wait_s):
                raise
