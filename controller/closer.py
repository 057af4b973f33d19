"""Closes steps one after the other, decides what follows, and has it written before it is said."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence, Set

from controller.aggregate import Aggregator, add_up, cursors_after
from controller.decide import ask, choose_all, propose_ahead
from controller.hands import Hands
from controller.history import Steering
from controller.ledger_schema import Entry, Kind, event_entry
from controller.patience import Patience
from controller.policy_runner import Advice
from controller.saving import Saving
from controller.scribe import Scribe
from controller.state import RunState
from controller.step_row import StepRow
from controller.threads import Signal
from controller.tracing import span
from protos.failpoints import DurableWrite, Failpoint
from protos.types import Step

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 256
"""Steps that are closed and committed together when their reports come faster than commits end."""

_AT_ONCE_S = 0.005
"""How long steps that wait may keep the first of them from its commit."""

_PRUNINGS = 10
"""So many times are reports dropped in as many steps as are kept."""

_DECISION = DurableWrite("ledger.decision", "a step, its plan and its seal are committed")
_SKIP = DurableWrite("ledger.skip", "steps that nobody reported are committed")
_SNAPSHOT = DurableWrite("ledger.snapshot", "it is recorded that the policy's state was saved")
BROADCAST = Failpoint("plans.broadcast", "after a seal is committed, before anybody hears of it")

_SILENCE = Advice(shares=None, fault="no rank reported the step")


class StepCloser:
    """The decisions of `controller.loop.ControlLoop`, which calls it one at a time."""

    def __init__(
        self,
        state: RunState,
        hands: Hands,
        *,
        scribe: Scribe,
        saving: Saving,
        patience: Patience,
        keep_steps: int | None,
        now: Callable[[], float],
    ) -> None:
        self.steering = Steering()
        self.is_drained = False
        self.changed = Signal()
        """Seals and generations: whatever those who watch the plans must hear of."""

        self.writing = asyncio.Lock()
        """Held while a decision is drafted and committed."""

        self._state = state
        self._hands = hands
        self._scribe = scribe
        self._saving = saving
        self._patience = patience
        self._keep_steps = keep_steps
        self._pruned_before = 0
        self._disputed_through = -2
        self._now = now
        self._unwritten: Callable[[], Awaitable[None]] | None = None
        """What is to be decided first once the ledger can be written."""

    async def close_next(self, group: Aggregator) -> bool:
        """Close the next step if it is time; return whether one was closed.

        Raises:
            LedgerError: it could not be written; the next call tries again.
        """
        if self._unwritten is not None:
            await self._until_written(self._unwritten)
        elif group.is_complete():
            await self._close(group)
        elif group.is_passed() or self._is_overdue(group):
            await self._close_overdue(group)
        else:
            return False
        return True

    def forget_unwritten(self) -> None:
        """Decide no more upon steps of a generation that has ended."""
        self._unwritten = None

    def start_snapshot(self) -> asyncio.Task[str]:
        """Save the policy as it is now; between two decisions."""
        step = Step(self._state.observed_through)

        async def record(path: str) -> None:
            async with self.writing:
                saved = Entry(kind=Kind.SNAPSHOT, step=step, body={"path": path})
                await self._scribe.commit([saved], _SNAPSHOT)
                await self._prune()

        return self._saving.start(step, record)

    async def _prune(self) -> None:
        """Drop reports of steps long past, some together."""
        state, keep = self._state, self._keep_steps
        if keep is None:
            return
        before = min(state.observed_through + 1 - keep, state.floor)
        if before - self._pruned_before >= max(keep // _PRUNINGS, 1):
            await self._scribe.prune(before, num_lanes=state.spec.lanes)
            self._pruned_before = before

    def _is_overdue(self, group: Aggregator) -> bool:
        # Once drained nothing is sealed any more, so nobody is helped by closing steps early.
        return not self.is_drained and self._patience.is_over(group, self._state)

    async def _until_written(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`; if the ledger does not take it, it is done before all else once it does."""
        self._unwritten = work
        await work()
        self._unwritten = None

    async def _close_overdue(self, group: Aggregator) -> None:
        """Go on without the reports that have not come, or never will."""
        end = self._patience.end(group, self._state)
        if end <= group.next_step:
            await self._close(group)
        else:
            await self._skip(group, end)

    async def _skip(self, group: Aggregator, end: Step) -> None:
        """Hold the plan in force for steps before `end`, of which nothing was heard."""
        first = group.next_step
        logger.warning("no reports of steps %d..%d; the plan in force is held", first, end - 1)
        group.skip_to(end)
        self._hands.metrics.totals.missing_reports += (end - first) * group.world_size
        body = {"first": first, "generation": group.generation, "ranks": group.world_size}
        skipped = Entry(kind=Kind.SKIP, step=end - 1, body=body)
        await self._until_written(lambda: self._write_skip(skipped))

    async def _write_skip(self, skipped: Entry) -> None:
        state, last = self._state, skipped.step
        async with self.writing:
            draft = state.draft()
            if not self.is_drained:
                draft = state.draft(through=last + state.spec.lag, observed_through=last)
            await self._scribe.commit([skipped, draft.seal_record()], _SKIP)
            state.sealed(draft)
        BROADCAST.hit()
        self.changed.notify()

    async def _close(self, group: Aggregator) -> None:
        """Close the next step and the complete ones after it, and decide what follows from them."""
        with span("decision", step=group.next_step, generation=group.generation):
            await self._close_now(group)

    async def _close_now(self, group: Aggregator) -> None:
        started = self._now()
        rows = [await self._take_step(group)]
        while self._may_take_more(group, rows[-1].step, len(rows), started):
            rows.append(await self._take_step(group))
        rows = [row for row in rows if row.is_open]
        if not rows:
            return
        if not self._hands.policy.learns:
            with span("policy", step=rows[0].step, num_steps=len(rows)):
                await propose_ahead(rows, self._state, self._hands)
        await self._until_written(lambda: self._decide(rows, started))
        for _ in rows:
            self._hands.metrics.decided(self._now() - started)
        if self._saving.is_due(rows[-1].step):
            self.start_snapshot()

    def _may_take_more(self, group: Aggregator, last: Step, count: int, started_s: float) -> bool:
        return (
            count < MOST_AT_ONCE
            and self._now() - started_s < _AT_ONCE_S
            and group is self._state.group
            and group.is_complete()
            and self._state.told_by_ranks() is None
            and not self._saving.ends_with(last)
        )

    async def _take_step(self, group: Aggregator) -> StepRow:
        """Close the next step; a policy that learns observes it."""
        state, hands = self._state, self._hands
        with span("take", step=group.next_step):
            step, reports = group.next_step, group.close()
            planned = state.book.plan_at(step).mixture
            observation = add_up(
                reports, state.spec, step=step, planned=planned, world_size=group.world_size
            )
        self._dispute(step, state.confirm(step, {each.plan_version for each in reports}))
        hands.metrics.step_closed(observation, reports)
        row = StepRow(group, observation, reports, lag=state.spec.lag)
        if step <= state.observed_through or self.is_drained:
            row.is_open = False
            self._move_cursors(row)
            self._scribe.note(*row.entries(hands.metrics, ["recorded only"]))
        elif not reports:
            row.proposals = [(Step(step + state.spec.lag), _SILENCE)]
        else:
            with span("policy", step=step):
                await ask(row, Step(step + state.spec.lag), hands, self._scribe.note)
        return row

    def _dispute(self, step: Step, versions: Set[int]) -> None:
        """Say that ranks had other plans than the ledger's in a step, once for steps in a row.

        A worker that composed them alone will say so, unless it is dead: then this is all there is.
        """
        if not versions:
            return
        if step != self._disputed_through + 1:
            planned, other = self._state.book.plan_at(step).version, sorted(versions)
            logger.warning("ranks had plan %s, not %d, from step %d on", other, planned, step)
            self._scribe.note(
                event_entry("plan disputed", step=step, plan=planned, ranks_had=other)
            )
        self._disputed_through = step

    async def _decide(self, rows: Sequence[StepRow], started_s: float) -> None:
        state, hands = self._state, self._hands
        async with self.writing:
            held_before = hands.metrics.totals.held_decisions
            draft = state.draft()
            for row in rows:
                self._move_cursors(row)
                with span("guard", step=row.step):
                    reasons = choose_all(row.proposals, draft, state, hands, self.steering)
                row.decided = draft.in_force if row.proposals else None
                draft.observe(row.step)
                row.decision_ms = (self._now() - started_s) * 1000
                draft.entries += row.entries(
                    hands.metrics, reasons, policy_phase=hands.policy.phase
                )
            try:
                with span("commit", sealed_through=draft.sealed_through):
                    await self._scribe.commit([*draft.entries, draft.seal_record()], _DECISION)
            except BaseException:
                # It is decided again, perhaps otherwise: workers may have gone on meanwhile.
                hands.metrics.totals.held_decisions = held_before
                raise
            state.sealed(draft)
        BROADCAST.hit()
        self.changed.notify()

    def _move_cursors(self, record: StepRow) -> None:
        # A generation may have begun while the policy thought; its ranks stand elsewhere.
        if record.group is self._state.group:
            self._state.move_cursors(record.step, cursors_after(record.reports))
