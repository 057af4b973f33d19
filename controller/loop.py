"""The decision loop: reports in, plans out, each in the ledger before anybody hears of it.

    who             does                         waits for                 woken by
    run             closes steps, decides        a report, the grace time  stir, a tick
    begin           starts a generation          a commit under way        -
    steer           takes the wheel              a commit under way        -
    watchers        state.next_event             changed                   a seal, a generation
    policy thread   observe, propose, copy       its queue                 run
    policy writer   write what was copied        the policy thread         run
    ledger thread   commit, read                 its queue                 whoever commits

`_turn` is held for a whole decision, `_writing` only while one is committed, so that a generation
can begin while the policy thinks.

While the ledger cannot be written nothing is decided: reports are kept, workers hear nothing and go
on with the last plan (`is_silent`). Once it can, they are told anew and asked how far they went.

What workers composed alone meanwhile they say before anything is decided (`controller.settling`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from controller import history as past
from controller.closer import BROADCAST, StepCloser
from controller.decide import delivered_epochs
from controller.guard import GuardResult
from controller.hands import Hands, Pace
from controller.history import Steering
from controller.ledger_schema import (
    Entry,
    cursors_entry,
    event_entry,
    fork_entry,
    membership_entry,
)
from controller.membership import Gathering, Membership, joined_cursors
from controller.patience import Patience
from controller.saving import Saving
from controller.scribe import Scribe
from controller.settling import Settling
from controller.snapshots import SavePace
from controller.state import RunState
from controller.threads import Signal
from protos.errors import LedgerError, NotReady, StaleGeneration
from protos.failpoints import DurableWrite
from protos.types import Mixture, ReportAnswer, Step, StepReport

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""How often waiting times are looked at."""

MOST_WAITING = 1024
"""Steps whose reports are kept while the ledger cannot be written."""

_NOTES = DurableWrite("ledger.notes", "events, late reports and quarantines are committed")
_GENERATION = DurableWrite("ledger.generation", "a generation, or a fork of one, is committed")
_CONTROL = DurableWrite("ledger.control", "what an operator orders is committed")


class ControlLoop:
    """The only place where a run moves on. Lives on one event loop."""

    def __init__(
        self,
        state: RunState,
        hands: Hands,
        *,
        steering: Steering,
        pace: Pace,
        now: Callable[[], float],
    ) -> None:
        self.state = state
        self._hands = hands
        self._pace = pace
        self._now = now
        self.scribe = Scribe(hands.ledger, hands.ledger_thread, now=now)
        self._patience = Patience(hands.workers, grace_s=pace.report_grace_s, now=now)
        self._saving = Saving(
            hands,
            SavePace(pace.snapshot_every, now=now),
            saved_through=state.observed_through,
        )
        self._closer = StepCloser(
            state,
            hands,
            scribe=self.scribe,
            saving=self._saving,
            patience=self._patience,
            keep_steps=pace.keep_steps,
            now=now,
        )
        self._closer.steering = steering
        # Ranks may have gone on while there was no controller: how far is for workers to say.
        self.settling = Settling(
            state, hands.workers, self.scribe, changed=self._closer.changed, now=now
        )
        self._writing = self._closer.writing
        self._stirred = Signal()
        self._turn = asyncio.Lock()

    @property
    def steering(self) -> Steering:
        """Whether an operator holds the wheel."""
        return self._closer.steering

    @property
    def is_drained(self) -> bool:
        """Whether nothing is decided any more."""
        return self._closer.is_drained

    @property
    def changed(self) -> Signal:
        """Seals and generations: whatever those who watch the plans must hear of."""
        return self._closer.changed

    @property
    def first_free_step(self) -> Step:
        """The first step whose plan can still be changed."""
        state = self.state
        composed = self._hands.workers.composed_through(state.generation)
        # Before the first generation nothing is sealed, but its first steps have their plan.
        next_sealed = state.observed_through + state.spec.lag
        return Step(max(state.sealed_through, next_sealed, composed) + 1)

    @property
    def epoch(self) -> int:
        """The number of this controller among all that have opened the ledger."""
        return self._hands.ledger.epoch

    @property
    def is_silent(self) -> bool:
        """Whether nothing can be decided, so that workers must not wait for it."""
        return bool(self.scribe.fault)

    @property
    def holds_back(self) -> bool:
        """Whether no worker may be told of plans now."""
        return self.is_silent or self.settling.is_amending

    def stir(self) -> None:
        """Have the loop look again at whether there is something to do."""
        self._stirred.notify()

    def note(self, *entries: Entry) -> None:
        """Have `entries` written with the next commit, within a second or so."""
        self.scribe.note(*entries)

    def add_report(self, report: StepReport) -> ReportAnswer:
        """Take in what a rank says of a step.

        Raises:
            StaleGeneration: its generation has ended.
            InvalidMessage: a field cannot be right.
        """
        state = self.state
        if state.group is None:
            raise StaleGeneration(
                f"rank {report.rank} reports step {report.step} in generation "
                f"{report.generation}, but none has begun here; join again"
            )
        if self.is_silent and state.group.num_waiting >= MOST_WAITING:
            raise NotReady(
                f"{MOST_WAITING} steps wait for a decision, but {self.scribe.fault}; the report of "
                f"step {report.step} is not taken in now"
            )
        counted = state.group.add(report, sealed_through=state.sealed_through)
        state.trained_through = max(state.trained_through, report.step)
        if counted:
            self.stir()
        elif report.step < state.group.next_step and (
            # Else the same report waits already, and moves them when its step is closed.
            newer := state.move_cursors(report.step, report.cursors)
        ):
            self.note(cursors_entry(report.step, newer, report.generation))
        return ReportAnswer(
            plan_version=state.newest_plan.version,
            sealed_through=state.sealed_through,
            counted=counted,
            epoch=self.epoch,
            observed_through=state.observed_through,
            ledger_head=self._hands.ledger.head,
        )

    async def run(self) -> None:
        """Decide whenever a decision is due, for ever.

        Raises:
            AlreadyServing: another controller has taken the ledger over.
            LedgerError: the ledger is damaged, so that no decision can be written any more.
        """
        while True:
            seen = self._stirred.count
            try:
                if self.is_silent and not await self._mend():
                    await self.scribe.wait_to_retry()
                elif not await self.advance():
                    await self.flush()
                    await self._stirred.wait_beyond(seen, TICK_S)
            except LedgerError:
                if not self.is_silent:
                    raise

    async def _mend(self) -> bool:
        """Try whether the ledger can be written again; if so, hear how far workers have gone."""
        self._lose_workers()
        async with self._writing:
            mended = await self.scribe.mend()
        if mended:
            self.settling.fall_due()
            self._hands.workers.forget_told()
            self.changed.notify()
        return mended

    async def advance(self) -> bool:
        """Close the next step if it is time; return whether one was closed."""
        self._lose_workers()
        async with self._turn:
            group = self.state.group
            if group is None or not await self.settling.settle(self._writing):
                return False
            return await self._closer.close_next(group)

    def _lose_workers(self) -> None:
        for name in self._hands.workers.expire():
            self.worker_lost(name, "silent for too long")
        self.note(*self._hands.workers.take_events())

    async def begin(self, gathering: Gathering) -> Membership:
        """Begin a generation of the ranks gathered.

        Raises:
            Disagreement: their checkpoints do not fit one another or the ledger.
            NotReady: the ledger cannot be written now.
        """
        state, hands = self.state, self._hands
        self._check_writable()
        await self.settling.wait_for_answers()
        async with self._writing:
            self._check_writable()
            if self.settling.is_due:
                await self.settling.amend()
            first, spec = gathering.first_step, state.spec
            known = await hands.ledger_thread.call(past.cursors_before, hands.ledger, first, spec)
            cursors, cursor_steps = joined_cursors(gathering, known, spec)
            await hands.ledger_thread.call(past.check_wound, hands.ledger, cursor_steps, first)
            membership = state.next_membership(
                world_size=gathering.world_size,
                first_step=first,
                attempt_ids={r: request.attempt_id for r, request in gathering.requests.items()},
                cursors=cursors,
                cursor_steps=cursor_steps,
            )
            entries = [membership_entry(membership)]
            if first <= state.trained_through:
                entries.append(fork_entry(membership, state.trained_through))
            draft = state.draft(through=first - 1 + spec.lag, observed_through=first - 1)
            await self._commit_now([*entries, draft.seal_record()], _GENERATION)
            state.sealed(draft)
            self._closer.forget_unwritten()
            floor = min(cursor_steps.values())
            book = state.book
            if book.plans[0].first_step > floor:
                book = await hands.ledger_thread.call(past.book_from, hands.ledger, floor, spec)
            state.begun(membership, book)
            state.trained_through = first - 1
            self.settling.is_due = False
            self._patience.begin_anew()
        BROADCAST.hit()
        self.changed.notify()
        logger.info(
            "generation=%d begins ranks=%d step=%d",
            membership.generation,
            membership.world_size,
            first,
        )
        return membership

    async def steer(self, *, override: Mixture | None, frozen: bool) -> Step:
        """Let the operator hold the wheel or give it back; return the first step that obeys."""
        self._check_writable()
        async with self._writing:
            self._check_writable()
            steering = Steering(override=override, frozen=frozen)
            if steering != self.steering:
                await self._commit_now([steering.as_entry()], _CONTROL)
                self._closer.steering = steering
            return self.first_free_step

    def preview(self, wanted: Mixture) -> GuardResult:
        """Say what the guard would make of a mixture now, were it the policy's proposal."""
        guard, state = self._hands.guard, self.state
        epochs = delivered_epochs(state.cursors, state.spec) if guard.counts_epochs else None
        held = state.newest_plan.mixture
        return guard.apply(wanted.shares, held=held, delivered_epochs=epochs)

    async def snapshot(self) -> str:
        """Save the policy's state; return where it is.

        Raises:
            LedgerError: it could not be written.
        """
        async with self._turn:
            saving = self._closer.start_snapshot()
        return await saving

    async def drain(self) -> None:
        """Close what is complete, then decide no more; later reports are only recorded."""
        while not self.is_drained and await self.advance():
            pass
        async with self._turn:
            if self.is_drained:
                return
            self._closer.is_drained = True
            self.note(event_entry("drained", step=self.state.observed_through))
            saving = self._closer.start_snapshot()
        await saving
        await self.flush()

    async def stop(self, deciding: asyncio.Task[None], *, timeout_s: float) -> None:
        """End `deciding`, which is `run`, between two decisions, and save what there is to save."""
        self.scribe.give_up()
        async with self._turn:
            failed = deciding.done() or self.is_silent
            deciding.cancel()
            is_new = self.state.observed_through > self._saving.saved_through
            if is_new and not failed:
                self._closer.start_snapshot()
        await asyncio.wait({deciding}, timeout=timeout_s)
        if not failed:
            await self.finish_saving(timeout_s=timeout_s)

    async def finish_saving(self, *, timeout_s: float = 10.0) -> None:
        """Write what was noted, and wait for the policy's state to be saved."""
        await self._saving.finish(timeout_s)
        await self.flush()

    def worker_lost(self, worker_id: str, reason: str) -> None:
        """Note that a worker is gone."""
        level = logging.INFO if self.is_drained else logging.WARNING
        logger.log(level, "worker lost worker=%s: %s", worker_id, reason)
        self.note(event_entry("worker lost", worker=worker_id, reason=reason))

    async def flush(self) -> None:
        """Write what was noted."""
        if self.scribe.noted and not self.is_silent:
            async with self._writing:
                await self.scribe.commit([], _NOTES)

    async def _commit_now(self, entries: Sequence[Entry], write: DurableWrite) -> None:
        """Commit what somebody waits for, who may ask again if it cannot be written."""
        try:
            await self.scribe.commit(entries, write)
        except LedgerError as error:
            if not self.is_silent:
                raise
            self.stir()
            raise NotReady(f"{error}; ask again") from error

    def _check_writable(self) -> None:
        if self.is_silent:
            raise NotReady(f"{self.scribe.fault}; nothing is decided until that has passed")
