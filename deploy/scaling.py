"""`headrace scale`: more or fewer loader workers for a live run, watched until it has happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from protos.client import AdminClient
from protos.errors import NotReady, Retryable
from protos.status import RunStatus, WorkerStatus

_POLL_S = 0.3
_CALL_TIMEOUT_S = 5.0
_STILL_S = 3.0
"""Lanes that no worker could be given evenly have settled when none has moved for so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """What scaling came to."""

    workers_before: int
    workers_after: int
    lanes_moved: int
    lanes: dict[str, int]
    """How many lanes each worker serves now."""

    seconds: float

    def as_json(self) -> str:
        """Return it as a JSON object."""
        fields = ("workers_before", "workers_after", "lanes_moved", "lanes", "seconds")
        return json.dumps({name: getattr(self, name) for name in fields}, indent=2)


def scale_to(
    admin: AdminClient,
    wanted: int,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    now: Callable[[], float] = time.monotonic,
    wait: Callable[[float], Any] = time.sleep,
) -> Scaled:
    """Have a run scaled, and wait until its lanes lie evenly with so many workers.

    Raises:
        ConfigError: nobody manages the run's workers.
        NotReady: it has not happened within `timeout_s`; the wish stands.
        ControllerUnreachable: nobody answers.
    """
    started, before = now(), admin.status(timeout_s=_CALL_TIMEOUT_S)
    num_before = len(_managed(before))
    admin.scale(wanted, timeout_s=_CALL_TIMEOUT_S)
    moved, moved_s, seen = before.lanes_moved, started, before
    while now() - started < timeout_s:
        wait(_POLL_S)
        try:
            status = admin.status(timeout_s=_CALL_TIMEOUT_S)
        except Retryable as error:
            say(f"the controller does not answer, asking again: {error}")
            continue
        for line in changes(seen, status):
            say(line)
        if status.lanes_moved != moved:
            moved, moved_s = status.lanes_moved, now()
        seen = status
        if has_happened(status, wanted, is_still=now() - moved_s >= _STILL_S):
            return Scaled(
                workers_before=num_before,
                workers_after=len(_managed(status)),
                lanes_moved=status.lanes_moved - before.lanes_moved,
                lanes={each.worker_id: len(each.lanes) for each in _serving(status)},
                seconds=round(now() - started, 2),
            )
    raise NotReady(
        f"{wanted} loader workers are wanted, {len(_managed(seen))} serve after {timeout_s:g} s; "
        "the wish stands, `headrace status` says how it goes"
    )


def changes(before: RunStatus, after: RunStatus) -> Iterator[str]:
    """Yield a line for each worker that came, is leaving or went, and for lanes that moved."""
    known = {each.worker_id: each for each in before.workers if each.alive}
    here = {each.worker_id: each for each in after.workers if each.alive}
    for name in sorted(here.keys() - known.keys()):
        yield f"{name} serves at {here[name].endpoint}"
    for name in sorted(here):
        if here[name].leaving and not (name in known and known[name].leaving):
            yield f"{name} is leaving"
    for name in sorted(known.keys() - here.keys()):
        yield f"{name} has ended"
    if after.lanes_moved > before.lanes_moved:
        lanes = ", ".join(f"{each.worker_id} {len(each.lanes)}" for each in _serving(after))
        yield f"{after.lanes_moved - before.lanes_moved} lanes moved: {lanes}"


def has_happened(status: RunStatus, wanted: int, *, is_still: bool) -> bool:
    """Say whether so many managed workers serve, all others are gone, and lanes lie evenly."""
    if len(_managed(status)) != wanted or any(w.alive and w.leaving for w in status.workers):
        return False
    have = [len(each.lanes) for each in _serving(status)]
    return bool(sum(have)) and (max(have) - min(have) <= 1 or is_still)


def _serving(status: RunStatus) -> list[WorkerStatus]:
    return [each for each in status.workers if each.alive and not each.leaving]


def _managed(status: RunStatus) -> list[WorkerStatus]:
    return [each for each in _serving(status) if each.managed]
