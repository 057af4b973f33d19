"""A controller whose services are on real gRPC and whose loop a test moves; and its digest."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from controller.ledger_schema import Kind
from protos.limits import CONTROLLER, Limits
from protos.server import serving_controller
from tests.fakes_controller import Bench, bench, small_run

T = TypeVar("T")

_LONG_S = 60.0


class Served:
    """A served bench; its services and its loop run on the thread of `loop`."""

    def __init__(self, made: Bench, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self.bench = made
        self.spec = made.spec
        self.address = address
        self._loop = loop

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the controller's thread do something, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_LONG_S)

    def digest(self) -> str:
        """Return a hash of all that decides what the run does from now on."""
        return self.do(self._digest())

    async def _digest(self) -> str:
        made = self.bench
        state, group, loop = made.state, made.state.group, made.loop
        # On the policy's own thread, behind what it may still be learning.
        policy = await made.runner._thread.call(made.runner._policy.state)
        gathering = made.service._joining._barrier.gathering
        # That the same state was saved again is recorded, and changes nothing.
        rows = [
            (row.kind, row.step, row.body, row.data)
            for row in made.ledger.rows()
            if row.kind is not Kind.SNAPSHOT
        ]
        parts = {
            "ledger": rows,
            "noted": loop.scribe.noted,
            "policy": (policy.arrays, policy.values),
            "plans": made.plans,
            "through": (state.sealed_through, state.observed_through, state.trained_through),
            "members": state.membership,
            "cursors": state.cursors,
            "steering": (loop.steering, loop.is_drained),
            "reports": (group.next_step, group._newest, group._pending) if group else None,
            "workers": [
                (each.worker_id, each.alive, each.lanes) for each in made.workers.statuses()
            ],
            "wanted": made.workers.wanted,
            "quarantines": made.workers.quarantines,
            "waiting": {} if gathering.is_starting else gathering.requests,
        }
        return hashlib.sha256(repr(_plain(parts)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return sorted((repr(_plain(key)), _plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@contextmanager
def served(folder: Path, *, limits: Limits = CONTROLLER, **changes: Any) -> Iterator[Served]:
    """Serve a small run's controller; its loop does nothing by itself."""
    ready, stop = threading.Event(), asyncio.Event()
    found: list[Served] = []

    async def serve(made: Bench) -> None:
        async with serving_controller(
            made.service, made.service, address="127.0.0.1:0", limits=limits, drain_s=0.1
        ) as address:
            found.append(Served(made, asyncio.get_running_loop(), address))
            ready.set()
            await stop.wait()
            made.service.stop()

    with bench(small_run(folder, **changes)) as made:
        thread = threading.Thread(target=asyncio.run, args=(serve(made),))
        thread.start()
        try:
            assert ready.wait(_LONG_S)
            yield found[0]
        finally:
            found[0]._loop.call_soon_threadsafe(stop.set)
            thread.join(_LONG_S)
