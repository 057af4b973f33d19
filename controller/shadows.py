"""Shadow policies: they see what the policy sees, and propose without acting.

    who             does                          waits for        woken by
    decision loop   observe, save                 never            -
    shadow thread   each shadow's turn, saving    its queue        observe, save

Nothing here can delay or break a decision. What shadows proposed is recorded once they have, in a
row of its own for each step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.ledger_schema import Entry, Kind, StepRecord
from controller.observation import StepObservation
from controller.policy import artefact
from controller.policy.base import Policy
from controller.snapshots import Snapshots
from controller.step_row import json_shares
from controller.threads import SingleThread
from protos.errors import ConfigError, LedgerError
from protos.status import ShadowStatus
from protos.types import Step

logger = logging.getLogger(__name__)

MAX_BACKLOG = 256
"""Steps that slow shadows may be behind; later ones they do not get to see."""


ShadowRecord = tuple[StepRecord, Step]
"""A step that shadows observed, and the step that they then proposed for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadow:
    """A policy and the name by which it is told from the others."""

    name: str
    policy: Policy


class Shadows:
    """Owns the shadow policies: nothing else touches them once it has begun."""

    def __init__(
        self,
        shadows: Sequence[Shadow],
        *,
        budget_s: float,
        folder: Path,
        origin: Mapping[str, Any],
    ) -> None:
        """Tell how long a turn may take, and where states are kept: a folder for each shadow."""
        self._shadows = tuple(shadows)
        self._budget_s = budget_s
        self._snapshots = {
            shadow.name: Snapshots(folder / shadow.name, origin=origin) for shadow in self._shadows
        }
        self._thread = SingleThread("headrace-shadows") if self._shadows else None
        self._backlog = 0
        self._statuses = {
            shadow.name: ShadowStatus(
                name=shadow.name, phase=shadow.policy.phase, shares=(), fault=""
            )
            for shadow in self._shadows
        }

    @property
    def statuses(self) -> tuple[ShadowStatus, ...]:
        """What each did last."""
        return tuple(self._statuses.values())

    def observe(
        self, observation: StepObservation, target: Step, note: Callable[[Entry], None]
    ) -> None:
        """Have all shadows observe a step and propose for `target`; returns at once.

        Called on the event loop, as `note` is later, with the record of what came of it.
        """
        if self._thread is None:
            return
        if self._backlog >= MAX_BACKLOG:
            fault = f"the shadows are {self._backlog} steps behind"
            faults = dict.fromkeys(self._statuses, fault)
            note(_entry(observation.step, target, observed=False, faults=faults))
            return
        self._backlog += 1
        future = asyncio.wrap_future(self._thread.submit(self._turns, observation, target))

        def ended(done: asyncio.Future[Entry]) -> None:
            self._backlog -= 1
            if not done.cancelled():
                note(done.result())

        future.add_done_callback(ended)

    def save(self, step: int) -> Future[None] | None:
        """Have all states saved as they are after what was observed so far; None: there are none.

        The future never fails: a state that could not be saved is a warning.
        """
        return None if self._thread is None else self._thread.submit(self._save, step)

    async def restore(self, read: Callable[[int], Awaitable[list[ShadowRecord]]]) -> None:
        """Bring each shadow to where it was: its newest state that fits, and what came after it.

        Args:
            read: gives the steps after one that shadows observed.
        """
        if self._thread is None:
            return
        for shadow in self._shadows:
            after = await self._thread.call(self._load, shadow)
            records = await read(after)
            await self._thread.call(self._replay, shadow, records)
            logger.info(
                "shadow=%s replayed %d steps after step %d", shadow.name, len(records), after
            )

    def close(self, timeout_s: float) -> None:
        """Let the shadows end what they are at."""
        if self._thread is not None and not self._thread.close(timeout_s):
            logger.warning("shadows have not come back within %g s; left behind", timeout_s)

    def _turns(self, observation: StepObservation, target: Step) -> Entry:
        proposals: dict[str, Any] = {}
        faults: dict[str, str] = {}
        for shadow in self._shadows:
            shares, fault = self._turn(shadow, observation, target)
            if fault:
                faults[shadow.name] = fault
            else:
                proposals[shadow.name] = json_shares(shares)
            self._statuses[shadow.name] = ShadowStatus(
                name=shadow.name, phase=shadow.policy.phase, shares=shares, fault=fault
            )
        return _entry(observation.step, target, observed=True, proposals=proposals, faults=faults)

    def _turn(
        self, shadow: Shadow, observation: StepObservation, target: Step
    ) -> tuple[tuple[float, ...], str]:
        """Return what a shadow proposes, and what was wrong; empty if nothing was."""
        begun = time.monotonic()
        try:
            shadow.policy.observe(observation)
            shares = tuple(float(share) for share in shadow.policy.propose(target))
        except Exception as error:
            logger.warning("shadow=%s failed step=%d: %s", shadow.name, observation.step, error)
            return (), f"the policy failed: {type(error).__name__}: {error}"
        if time.monotonic() - begun > self._budget_s:
            return (), f"the policy took more than {self._budget_s:g} s"
        return shares, ""

    def _save(self, step: int) -> None:
        for shadow in self._shadows:
            try:
                self._snapshots[shadow.name].write(shadow.policy.state(), step)
            except (LedgerError, ValueError) as error:
                logger.warning("shadow=%s: its state was not saved: %s", shadow.name, error)

    def _replay(self, shadow: Shadow, records: list[ShadowRecord]) -> None:
        for record, target in records:
            self._turn(shadow, record.observation, target)
        self._statuses[shadow.name] = ShadowStatus(
            name=shadow.name, phase=shadow.policy.phase, shares=(), fault=""
        )

    def _load(self, shadow: Shadow) -> int:
        """Restore the newest state that fits; return the step after which it was saved."""
        for step, path in self._snapshots[shadow.name].newest_first():
            try:
                shadow.policy.restore(artefact.load(path))
            except (ConfigError, ValueError) as error:
                logger.warning("the state %s of a shadow cannot be used: %s", path, error)
            else:
                return step
        return -1


def _entry(
    step: Step,
    target: Step,
    *,
    observed: bool,
    proposals: Mapping[str, Any] | None = None,
    faults: Mapping[str, str],
) -> Entry:
    body = {
        "observed": observed,
        "proposed_step": target,
        "proposals": dict(proposals or {}),
        "faults": dict(faults),
    }
    return Entry(kind=Kind.SHADOW, step=step, body=body)


def shadow_names(policies: Iterable[str]) -> list[str]:
    """Return a name for each policy: its own, and from the second of a kind on a number as well."""
    seen: dict[str, int] = {}
    names = []
    for policy in policies:
        seen[policy] = seen.get(policy, 0) + 1
        names.append(policy if seen[policy] == 1 else f"{policy}-{seen[policy]}")
    return names
