"""How workers and ledger come to agree on what was composed while the controller was not heard."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from controller.amends import Amendment
from controller.ledger_schema import Kind
from controller.scribe import Scribe
from controller.state import RunState
from controller.threads import Signal
from controller.workers import Workers
from protos.errors import InvalidMessage
from protos.failpoints import DurableWrite
from protos.types import AloneSteps, WorkerBeat

logger = logging.getLogger(__name__)

ANSWERS_S = 5.0
"""How long a new generation waits for what workers composed alone in the one before."""

LOOK_EVERY_S = 0.25

_AMEND = DurableWrite("ledger.amend", "plans give way to what workers composed alone")


class Settling:
    """AGREED -> DUE -> AGREED, over and over; `is_due` says which.

    It is due when a controller starts or its ledger can be written again, and when a worker says
    that it went on alone with another plan than the ledger has. Until all have said how far they
    went nothing is decided, and who was asked is not told of plans. A worker that hears nothing for
    `degraded_after_s` goes on alone meanwhile, as ever: this keeps no rank from training.
    """

    def __init__(
        self,
        state: RunState,
        workers: Workers,
        scribe: Scribe,
        *,
        changed: Signal,
        now: Callable[[], float],
    ) -> None:
        self.is_due = False
        self.is_amending = False
        """While an amendment is on its way to the ledger nobody is told of plans."""

        self._state = state
        self._workers = workers
        self._scribe = scribe
        self._changed = changed
        self._now = now
        self._checked: tuple[int, ...] = ()
        """What was at hand when plans were last held against what workers composed alone."""

        self.fall_due()

    def fall_due(self) -> None:
        """Have workers say how far they went; where there never were ranks, none went anywhere."""
        self.is_due = self._state.membership is not None

    def may_tell(self, worker_id: str) -> bool:
        """Say whether a worker that was asked how far it went may be told of plans."""
        is_settled = not self.is_due and not self.is_amending
        return is_settled and self._workers.has_answered(worker_id)

    def check(self, beat: WorkerBeat) -> None:
        """Refuse what a worker cannot have composed.

        Raises:
            InvalidMessage: it names a plan that there never was.
        """
        if beat.generation != self._state.generation:
            return
        newest = self._state.newest_version
        for each in beat.alone:
            if not 1 <= each.plan_version <= newest:
                raise InvalidMessage(
                    f"worker {beat.worker_id[:100]!r} says that it composed steps with plan "
                    f"{each.plan_version}; the run's plans are 1 to {newest}"
                )

    async def settle(self, writing: asyncio.Lock) -> bool:
        """Say whether workers and ledger agree; once all workers have spoken, make them agree.

        Raises:
            LedgerError: it could not be written.
        """
        self.is_due = self.is_due or self._is_contradicted()
        if self.is_due:
            if not self._workers.are_settled():
                return False
            async with writing:
                await self.amend()
            self.is_due = False
            self._changed.notify()
        # Workers that are dead say nothing; what they composed the ranks have trained on.
        if (told := self._state.told_by_ranks()) is not None:
            async with writing:
                await self.amend((told,))
            self._changed.notify()
        return True

    async def amend(self, told_by_ranks: tuple[AloneSteps, ...] = ()) -> None:
        """Have the ledger follow what was composed alone; the lock on writing is held.

        Args:
            told_by_ranks: what ranks say, in place of what workers do; empty: what workers say.

        Raises:
            LedgerError: it could not be written; the plans stay as they are.
        """
        self.is_amending = True
        try:
            amendment = self._amendment(told_by_ranks)
            if amendment.entries:
                await self._scribe.commit(amendment.entries, _AMEND)
                self._state.amended(amendment)
                for entry in amendment.entries:
                    if entry.kind is Kind.AMEND:
                        logger.warning(
                            "composed alone with another plan: steps=%d..%d plan=%d lanes=%s",
                            entry.step,
                            entry.body["through"],
                            entry.body["version"],
                            entry.body["lanes"] or "all",
                        )
        finally:
            self.is_amending = False

    async def wait_for_answers(self) -> None:
        """Wait a moment for workers that were asked: what they say is of a generation that ends."""
        deadline = self._now() + ANSWERS_S
        while self.is_due and self._workers.owe_answers and self._now() < deadline:
            await self._changed.wait_beyond(self._changed.count, LOOK_EVERY_S)

    def _is_contradicted(self) -> bool:
        """Say whether a worker composed steps alone with another plan than the ledger has."""
        workers, state = self._workers, self._state
        at_hand = (workers.num_alone, state.generation, state.newest_version)
        if workers.num_alone == 0 or at_hand == self._checked:
            return False
        self._checked = at_hand
        return bool(self._amendment().entries)

    def _amendment(self, told_by_ranks: tuple[AloneSteps, ...] = ()) -> Amendment:
        workers, generation = self._workers, self._state.generation
        return self._state.amendment(
            told_by_ranks or workers.alone(generation),
            heard_through=workers.heard_through(generation),
        )
