"""What loader workers are told of plans, and what they are asked before that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from controller.loop import ControlLoop
from controller.state import Told
from controller.workers import Workers
from protos.failpoints import Failpoint
from protos.types import PlanEvent

BEAT_S = 1.0
"""How often workers hear that the controller is alive."""

_TOLD = Failpoint("plans.told", "after a worker was told of plans, before the next one is")


class Teller:
    """The streams of plans, one for each worker; a worker's newest one counts."""

    def __init__(self, loop: ControlLoop, workers: Workers, *, stopping: asyncio.Event) -> None:
        self._loop = loop
        self._workers = workers
        self._stopping = stopping
        self._streams: dict[str, object] = {}

    async def watch(self, worker_id: str, *, answers: bool) -> AsyncIterator[PlanEvent]:
        """See `ControlService.watch_plans`."""
        stream = self._streams[worker_id] = object()
        try:
            async with aclosing(self._events(worker_id, answers=answers)) as events:
                async for event in events:
                    yield event
                    if not event.asked:
                        _TOLD.hit()
                    if event.reset and self._streams.get(worker_id) is stream:
                        self._workers.told_plans(worker_id)
        finally:
            # A worker that has opened a newer stream has heard the plans over that one.
            if self._streams.get(worker_id) is stream:
                del self._streams[worker_id]
                self._workers.tells_no_more(worker_id)

    async def _events(self, worker_id: str, *, answers: bool) -> AsyncGenerator[PlanEvent]:
        told: Told | None = None
        changed, scribe = self._loop.changed, self._loop.scribe
        num_faults, is_asked = scribe.num_faults, False
        while not self._stopping.is_set():
            seen = changed.count
            if told is not None and self._loop.holds_back:
                # Hearing nothing, the worker goes on with the last plan in a while.
                await changed.wait_beyond(seen, BEAT_S)
                continue
            if num_faults != scribe.num_faults:
                num_faults, told, is_asked = scribe.num_faults, None, False
            if answers and told is None:
                if not is_asked:
                    is_asked = True
                    yield self._question(worker_id)
                    continue
                # Also while nothing can be decided: a worker that is new must have a plan to go by.
                if not self._loop.settling.may_tell(worker_id):
                    await changed.wait_beyond(seen, BEAT_S)
                    continue
            event, told = self._loop.state.next_event(told)
            self._workers.questions.telling(worker_id, sealed_through=event.sealed_through)
            yield replace(event, epoch=self._loop.epoch)
            await changed.wait_beyond(seen, BEAT_S)

    def _question(self, worker_id: str) -> PlanEvent:
        """Ask a worker how far it went alone; having heard that, it goes no further for a while."""
        return PlanEvent(
            generation=self._loop.state.generation,
            plans=(),
            sealed_through=-1,
            epoch=self._loop.epoch,
            asked=self._workers.questions.ask(worker_id),
        )
