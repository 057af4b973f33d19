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
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from controller import history as past
from controller.aggregate import Aggregator, add_up, cursors_after
from controller.decide import ask, choose_all, propose_ahead
from controller.hands import Hands, Pace
from controller.history import Steering
from controller.ledger_schema import (
    Entry,
    Kind,
    cursors_entry,
    event_entry,
    fork_entry,
    membership_entry,
)
from controller.membership import Gathering, Membership, joined_cursors
from controller.patience import Patience
from controller.policy_runner import Advice
from controller.snapshots import SavePace
from controller.state import RunState
from controller.step_row import StepRow
from controller.threads import Signal
from protos.errors import StaleGeneration
from protos.types import Mixture, ReportAnswer, Step, StepReport

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""How often waiting times are looked at."""

MOST_AT_ONCE = 256
"""Steps that are closed and committed together when their reports come faster than commits end."""

_AT_ONCE_S = 0.005
"""How long steps that wait may keep the first of them from its commit."""

_SILENCE = Advice(shares=None, fault="no rank reported the step")


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
        self.steering = steering
        self.is_drained = False
        self.changed = Signal()
        """Seals and generations: whatever those who watch the plans must hear of."""

        self._hands = hands
        self._pace = pace
        self._now = now
        # Ranks may have gone on while there was no controller: how far is for workers to say.
        self._must_settle = state.membership is not None
        self._patience = Patience(hands.workers, grace_s=pace.report_grace_s, now=now)
        self._events: list[Entry] = []
        self._saving: set[asyncio.Task[str]] = set()
        self._saved_through = state.observed_through
        self._save_pace = SavePace(pace.snapshot_every, now=now)
        self._stirred = Signal()
        self._turn = asyncio.Lock()
        self._writing = asyncio.Lock()

    @property
    def first_free_step(self) -> Step:
        """The first step whose plan can still be changed."""
        state = self.state
        composed = self._hands.workers.composed_through(state.generation)
        # Before the first generation nothing is sealed, but its first steps have their plan.
        next_sealed = state.observed_through + state.spec.lag
        return Step(max(state.sealed_through, next_sealed, composed) + 1)

    def stir(self) -> None:
        """Have the loop look again at whether there is something to do."""
        self._stirred.notify()

    def note(self, *entries: Entry) -> None:
        """Have `entries` written with the next commit, within a second or so."""
        self._events.extend(entries)

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
        )

    async def run(self) -> None:
        """Decide whenever a decision is due, for ever.

        Raises:
            LedgerError: a decision could not be written; nobody has heard of it.
        """
        while True:
            seen = self._stirred.count
            if not await self.advance():
                await self.flush()
                await self._stirred.wait_beyond(seen, TICK_S)

    async def advance(self) -> bool:
        """Close the next step if it is time; return whether one was closed."""
        for name in self._hands.workers.expire():
            self.worker_lost(name, "silent for too long")
        self.note(*self._hands.workers.take_events())
        async with self._turn:
            group = self.state.group
            if group is None or not self._may_decide():
                return False
            if group.is_complete():
                await self._close(group)
            elif group.is_passed() or self._is_overdue(group):
                await self._close_overdue(group)
            else:
                return False
        return True

    async def begin(self, gathering: Gathering) -> Membership:
        """Begin a generation of the ranks gathered.

        Raises:
            Disagreement: their checkpoints do not fit one another or the ledger.
        """
        state, hands = self.state, self._hands
        async with self._writing:
            first, spec = gathering.first_step, state.spec
            known = await hands.ledger_thread.call(past.cursors_before, hands.ledger, first, spec)
            cursors, cursor_steps = joined_cursors(gathering, known, spec)
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
            await self._commit([*entries, draft.seal_record()])
            state.sealed(draft)
            floor = min(cursor_steps.values())
            book = state.book
            if book.plans[0].first_step > floor:
                book = await hands.ledger_thread.call(past.book_from, hands.ledger, floor, spec)
            state.begun(membership, book)
            state.trained_through = first - 1
            self._must_settle = False
            self._patience.begin_anew()
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
        async with self._writing:
            steering = Steering(override=override, frozen=frozen)
            if steering != self.steering:
                await self._commit([steering.as_entry()])
                self.steering = steering
            return self.first_free_step

    async def snapshot(self) -> str:
        """Save the policy's state; return where it is.

        Raises:
            LedgerError: it could not be written.
        """
        async with self._turn:
            saving = self._start_snapshot()
        return await saving

    async def drain(self) -> None:
        """Close what is complete, then decide no more; later reports are only recorded."""
        while not self.is_drained and await self.advance():
            pass
        async with self._turn:
            if self.is_drained:
                return
            self.is_drained = True
            self.note(event_entry("drained", step=self.state.observed_through))
            saving = self._start_snapshot()
        await saving
        await self.flush()

    async def stop(self, deciding: asyncio.Task[None], *, timeout_s: float) -> None:
        """End `deciding`, which is `run`, between two decisions, and save what there is to save."""
        async with self._turn:
            failed = deciding.done()
            deciding.cancel()
            is_new = self.state.observed_through > self._saved_through
            if is_new and not failed:
                self._start_snapshot()
        if failed:
            return
        await asyncio.wait({deciding}, timeout=timeout_s)
        await self.finish_saving(timeout_s=timeout_s)

    async def finish_saving(self, *, timeout_s: float = 10.0) -> None:
        """Write what was noted, and wait for the policy's state to be saved."""
        if self._saving:
            await asyncio.wait(self._saving, timeout=timeout_s)
        await self.flush()

    def worker_lost(self, worker_id: str, reason: str) -> None:
        """Note that a worker is gone."""
        level = logging.INFO if self.is_drained else logging.WARNING
        logger.log(level, "worker lost worker=%s: %s", worker_id, reason)
        self.note(event_entry("worker lost", worker=worker_id, reason=reason))

    async def flush(self) -> None:
        """Write what was noted."""
        if self._events:
            async with self._writing:
                await self._commit([])

    def _may_decide(self) -> bool:
        if self._must_settle and self._hands.workers.are_settled():
            self._must_settle = False
        return not self._must_settle

    def _is_overdue(self, group: Aggregator) -> bool:
        # Once drained nothing is sealed any more, so nobody is helped by closing steps early.
        return not self.is_drained and self._patience.is_over(group, self.state)

    async def _close_overdue(self, group: Aggregator) -> None:
        """Go on without the reports that have not come, or never will."""
        end = self._patience.end(group, self.state)
        if end <= group.next_step:
            await self._close(group)
        else:
            await self._skip(group, end)

    async def _skip(self, group: Aggregator, end: Step) -> None:
        """Hold the plan in force for steps before `end`, of which nothing was heard."""
        state, first = self.state, group.next_step
        logger.warning("no reports of steps %d..%d; the plan in force is held", first, end - 1)
        group.skip_to(end)
        self._hands.metrics.totals.missing_reports += (end - first) * group.world_size
        body = {"first": first, "generation": group.generation, "ranks": group.world_size}
        async with self._writing:
            draft = state.draft()
            if not self.is_drained:
                draft = state.draft(through=end - 1 + state.spec.lag, observed_through=end - 1)
            skipped = Entry(kind=Kind.SKIP, step=end - 1, body=body)
            await self._commit([skipped, draft.seal_record()])
            state.sealed(draft)
        self.changed.notify()

    async def _close(self, group: Aggregator) -> None:
        """Close the next step and the complete ones after it, and decide what follows from them."""
        started = self._now()
        rows = [await self._take_step(group)]
        while self._may_take_more(group, rows[-1].step, len(rows), started):
            rows.append(await self._take_step(group))
        rows = [row for row in rows if row.is_open]
        if not rows:
            return
        if not self._hands.policy.learns:
            await propose_ahead(rows, self.state, self._hands)
        await self._decide(rows, started)
        for _ in rows:
            self._hands.metrics.decided(self._now() - started)
        # A disk that is slower than that gets fewer snapshots, not a queue of copies.
        learns = self._hands.policy.learns
        if not self._saving and self._save_pace.is_due(rows[-1].step, learns=learns):
            self._start_snapshot()

    def _may_take_more(self, group: Aggregator, last: Step, count: int, started_s: float) -> bool:
        return (
            count < MOST_AT_ONCE
            and self._now() - started_s < _AT_ONCE_S
            and group is self.state.group
            and group.is_complete()
            and not self._save_pace.ends_with(last)
        )

    async def _take_step(self, group: Aggregator) -> StepRow:
        """Close the next step; a policy that learns observes it."""
        state, hands = self.state, self._hands
        step, reports = group.next_step, group.close()
        planned = state.book.plan_at(step).mixture
        observation = add_up(
            reports, state.spec, step=step, planned=planned, world_size=group.world_size
        )
        hands.metrics.step_closed(observation, reports)
        row = StepRow(group, observation, reports, lag=state.spec.lag)
        if step <= state.observed_through or self.is_drained:
            row.is_open = False
            self._move_cursors(row)
            self.note(*row.entries(hands.metrics, ["recorded only"]))
        elif not reports:
            row.proposals = [(Step(step + state.spec.lag), _SILENCE)]
        else:
            await ask(row, Step(step + state.spec.lag), hands, self.note)
        return row

    async def _decide(self, rows: Sequence[StepRow], started_s: float) -> None:
        state, hands = self.state, self._hands
        async with self._writing:
            draft = state.draft()
            for row in rows:
                self._move_cursors(row)
                reasons = choose_all(row.proposals, draft, state, hands, self.steering)
                row.decided = draft.in_force if row.proposals else None
                draft.observe(row.step)
                row.decision_ms = (self._now() - started_s) * 1000
                draft.entries += row.entries(
                    hands.metrics, reasons, policy_phase=hands.policy.phase
                )
            await self._commit([*draft.entries, draft.seal_record()])
            state.sealed(draft)
        self.changed.notify()

    def _move_cursors(self, record: StepRow) -> None:
        # A generation may have begun while the policy thought; its ranks stand elsewhere.
        if record.group is self.state.group:
            self.state.move_cursors(record.step, cursors_after(record.reports))

    def _start_snapshot(self) -> asyncio.Task[str]:
        """Save the policy as it is now, between two decisions; `_turn` is held."""
        step, hands = self.state.observed_through, self._hands
        self._saved_through = step
        hands.shadows.save(step)
        future = hands.policy.save(lambda state: hands.snapshots.write(state, step))

        async def record() -> str:
            path = await asyncio.wrap_future(future)
            body = {"path": str(path)}
            async with self._writing:
                await self._commit([Entry(kind=Kind.SNAPSHOT, step=step, body=body)])
            return str(path)

        task = asyncio.create_task(record())
        self._saving.add(task)
        task.add_done_callback(self._saved)
        return task

    def _saved(self, task: asyncio.Task[str]) -> None:
        self._saving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the policy's state was not saved: %s", error)

    async def _commit(self, entries: Sequence[Entry]) -> None:
        noted, self._events = self._events, []
        ledger = self._hands.ledger
        await self._hands.ledger_thread.call(ledger.commit, [*noted, *entries])
