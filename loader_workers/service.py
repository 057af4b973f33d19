"""The data service: streams of lane batches, composed as soon as their step is sealed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loader_workers.composer import Composer
from loader_workers.plans import PlanBoard
from loader_workers.source import WindowSource
from protos.errors import InvalidMessage, NotReady, WrongRun
from protos.spec import RunSpec
from protos.types import AloneSteps, Credit, OpenStream, PlanEvent, Step, StepBatch

_MESSAGE_BYTES = 1 << 20
"""Of tokens: with more, a message costs as much a step as with fewer steps, and is later."""

_FORGET_EVERY = 1024
_STEPS_REMEMBERED = 8192
"""Plans of so many steps before the slowest stream's are kept, for cursors that lie behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a worker says of its streams in its beats."""

    generation: int = 0
    needed_step: int = -1
    composed_through: int = -1
    degraded_steps: int = 0
    stall_s: float = 0.0
    sequences_served: int = 0
    open_streams: int = 0
    heard_epoch: int = 0
    answered: int = 0
    sealed_through: int = -1
    alone: tuple[AloneSteps, ...] = ()


class _Listener:
    """What one stream's rank said: credits, and the step that it waits for.

    Its state is guarded by the condition that the stream's turns wait on.
    """

    def __init__(self, changed: threading.Condition, opening: OpenStream) -> None:
        self._changed = changed
        self._credits = opening.credits
        self._gone = False
        self.step = opening.from_step
        self.needed_step = -1
        self.needed_since = 0.0

    def listen(self, credits: Iterator[Credit], now: Callable[[], float]) -> None:
        """Take in credits until the rank is gone."""
        try:
            for credit in credits:
                with self._changed:
                    self._credits += credit.steps
                    if credit.needed_step != self.needed_step:
                        self.needed_step, self.needed_since = credit.needed_step, now()
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._gone = True
                self._changed.notify_all()

    def may_send(self) -> int | None:
        """Return how many steps there are credits for; None: the rank is gone."""
        return None if self._gone else self._credits

    def spend(self, num_steps: int) -> None:
        """Take the credits for steps that are about to be sent."""
        with self._changed:
            self._credits -= num_steps


class LoaderService:
    """Serves lanes to ranks. Holds nothing of a stream that its cursors do not bring back.

    Before `configure` it answers `NotReady`: its address must be known before the run is.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._run: tuple[WindowSource, PlanBoard] | None = None
        self._listeners: set[_Listener] = set()
        self._stall_s = 0.0
        self._sequences_served = 0
        self._stopped = False

    def configure(self, source: WindowSource) -> None:
        """Say which run is served, from where."""
        with self._lock:
            self._run = (source, PlanBoard(source.spec, now=self._now))

    def hear(self, event: PlanEvent) -> None:
        """Take in plans and seals.

        Raises:
            NotReady: before `configure`.
            InvalidMessage: the plans do not lead to one another.
        """
        self._configured()[1].hear(event)

    def figures(self) -> Figures:
        """Return what a beat says of the streams."""
        with self._lock:
            run, listeners = self._run, list(self._listeners)
        if run is None:
            return Figures()
        board = run[1]
        with board.changed:
            sealed = board.sealed_through
            waiting = [each.needed_step for each in listeners if each.needed_step > sealed]
            return Figures(
                generation=board.generation,
                needed_step=min(waiting, default=-1),
                composed_through=board.composed_through,
                degraded_steps=board.num_degraded,
                stall_s=self._stall_s,
                sequences_served=self._sequences_served,
                open_streams=len(listeners),
                heard_epoch=board.epoch,
                answered=board.answered,
                sealed_through=sealed,
                alone=board.alone,
            )

    def stop(self) -> None:
        """End all streams with `NotReady`; idempotent."""
        with self._lock:
            self._stopped = True
            run = self._run
        if run is not None:
            run[1].close()

    def stream_batches(self, opening: OpenStream, credits: Iterator[Credit]) -> Iterator[StepBatch]:
        """Yield the batches of some lanes, step by step; see `protos.services.DataService`."""
        source, board = self._configured()
        check_opening(opening, source.spec)
        board.wait_generation(opening.generation)
        listener = _Listener(board.changed, opening)
        composer = Composer(
            source,
            opening.cursors,
            first_slot=opening.first_slot,
            end_slot=opening.end_slot,
            documents=opening.documents,
        )
        threading.Thread(
            target=listener.listen, args=(credits, self._now), name="credits", daemon=True
        ).start()
        with self._lock:
            self._listeners.add(listener)
        if (shares := board.newest_shares) is not None:
            # A lane that moves here is wanted some steps later: its windows shall be open by then.
            composer.prepare(shares)
        try:
            yield from self._batches(opening, board, listener, composer)
        finally:
            with self._lock:
                self._listeners.discard(listener)
            composer.close()

    def _batches(
        self, opening: OpenStream, board: PlanBoard, listener: _Listener, composer: Composer
    ) -> Iterator[StepBatch]:
        step, plan_version = opening.from_step, -1
        most_steps = most_in_a_message(opening, composer.step_bytes)
        while True:
            turn = board.wait_turn(
                step,
                opening.generation,
                may_send=listener.may_send,
                needed_step=lambda: listener.needed_step,
                lanes=opening.cursors,
                most_steps=most_steps,
            )
            if turn is None:
                return
            started = self._now()
            if turn.plan_version != plan_version:
                composer.prepare(turn.shares)
                plan_version = turn.plan_version
            if step == opening.from_step:
                # Only now, as the plans of all steps before a sealed one are known.
                composer.wind(board.lane_totals(opening.cursor_steps, step))
            batch = StepBatch(
                step=step,
                plan_version=turn.plan_version,
                degraded=turn.degraded,
                lanes=composer.compose_steps(step, turn.counts),
                num_steps=len(turn.counts),
            )
            listener.spend(batch.num_steps)
            self._count(batch, listener, started)
            yield batch
            step = Step(step + batch.num_steps)

    def _count(self, batch: StepBatch, listener: _Listener, started: float) -> None:
        waited_since = max(started, listener.needed_since)
        is_waited_for = listener.needed_step >= batch.step
        with self._lock:
            if is_waited_for:
                self._stall_s += max(self._now() - waited_since, 0.0)
            self._sequences_served += sum(len(lane.domain_ids) for lane in batch.lanes)
            listener.step = batch.step
            oldest = min(each.step for each in self._listeners)
        end = batch.step + batch.num_steps
        if (end - 1) // _FORGET_EVERY > (batch.step - 1) // _FORGET_EVERY:
            self._configured()[1].forget_before(Step(oldest - _STEPS_REMEMBERED))

    def _configured(self) -> tuple[WindowSource, PlanBoard]:
        with self._lock:
            if self._run is None or self._stopped:
                state = "stopping" if self._stopped else "waiting for the run's settings"
                raise NotReady(f"the loader worker is {state}; ask again or ask another")
            return self._run


def most_in_a_message(opening: OpenStream, step_bytes: int) -> int:
    """Return how many steps of so many bytes each go into one message at most."""
    return max(min(opening.most_steps, _MESSAGE_BYTES // max(step_bytes, 1)), 1)


def check_opening(opening: OpenStream, spec: RunSpec) -> None:
    """Hold a rank's request against the run.

    Raises:
        WrongRun: it is meant for another run.
        InvalidMessage: lanes, slots, cursors or credits are out of bounds.
    """
    if opening.run_id != spec.run_id:
        raise WrongRun(f"this worker serves run {spec.run_id!r}, not {opening.run_id!r}")
    if not 0 <= opening.first_slot < opening.end_slot <= spec.global_sequences:
        raise InvalidMessage(
            f"rank {opening.rank} asks for slots [{opening.first_slot}, {opening.end_slot}); a "
            f"step has {spec.global_sequences}"
        )
    if not opening.cursors or opening.from_step < 0 or opening.credits < 0:
        raise InvalidMessage(
            f"rank {opening.rank} opens {len(opening.cursors)} lanes from step "
            f"{opening.from_step} with {opening.credits} credits; there must be at least one lane "
            "and neither number may be negative"
        )
    if opening.cursors.keys() != opening.cursor_steps.keys():
        raise InvalidMessage(f"rank {opening.rank}: each cursor needs its step")
    for lane, places in opening.cursors.items():
        width = spec.slots_per_lane
        if not 0 <= lane < spec.lanes or not (
            lane * width < opening.end_slot and opening.first_slot < (lane + 1) * width
        ):
            raise InvalidMessage(
                f"lane {lane} of {spec.lanes} has none of rank {opening.rank}'s slots "
                f"[{opening.first_slot}, {opening.end_slot})"
            )
        if places.shape != (spec.num_domains, 3):
            raise InvalidMessage(
                f"the cursor of lane {lane} has the shape {places.shape}; the run has "
                f"{spec.num_domains} domains, with 3 numbers each"
            )
        if not 0 <= opening.cursor_steps[lane] <= opening.from_step:
            raise InvalidMessage(
                f"the cursor of lane {lane} stands at step {opening.cursor_steps[lane]}, after "
                f"step {opening.from_step} that rank {opening.rank} asks for"
            )
