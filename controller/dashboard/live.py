"""What watchers are told: the newest points of the curves, and how the run stands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from controller.dashboard.ledger_tail import LedgerTail
from controller.dashboard.operated import Reach
from controller.dashboard.series import Series
from controller.threads import Bell, Signal, SingleThread
from protos.errors import HeadraceError
from protos.status import RunStatus, WorkerStatus
from protos.types import StepReport

logger = logging.getLogger(__name__)

LOOK_S = 0.4
"""From one look at the ledger to the next while somebody watches and it is written."""

IDLE_S = 2.0
"""The same while nobody watches."""

STATUS_S = 1.0
"""How often the status is asked for while somebody watches: of what workers hold and wait for
nothing is written."""

BEAT_S = 10.0
"""How often watchers hear something even if nothing has happened."""

MAX_BUCKETS = 64
"""Changed points that are sent one by one; beyond it the curves are to be asked for anew."""

MAX_WATCHERS = 32
MAX_LISTED = 100
"""Quarantines, workers and ranks that are listed; the others are counted."""


class Live:
    """Follows the run while the page is served. Lives on the page's event loop."""

    def __init__(self, reach: Reach, tail: LedgerTail) -> None:
        self.tail = tail
        self.reach = reach
        self.num_watchers = 0
        self.status: dict[str, Any] = {}
        self._ranks: dict[int, list[float]] = {}
        self.written = Bell()
        """To be rung when there may be something new in the ledger."""

        self._changed = Signal()
        self._watched = asyncio.Event()
        self._stopping = False
        self._status_at_s = -math.inf
        self._packed: tuple[tuple[int | None, int], int, str] | None = None
        self._status_text = ""
        self._status_version = 0
        self._reader = SingleThread("headrace-page-reader")

    async def follow(self) -> None:
        """Read on and on, until cancelled."""
        last_s = time.monotonic() - LOOK_S
        while True:
            self.written.arm()
            now_s = time.monotonic()
            before = (self.tail.series.version, self._status_version)
            try:
                await self._reader.call(self.tail.read_on, now_s - last_s)
                last_s = now_s
                if self.num_watchers and now_s - self._status_at_s >= STATUS_S:
                    await self._ask()
            except HeadraceError as error:
                logger.debug("the page cannot be brought up to date: %s", error)
            if before != (self.tail.series.version, self._status_version):
                self._changed.notify()
            await self._until_due(now_s)

    async def between(self, first: int, last: int) -> Series:
        """Read a range of steps, one after the other with all else that is read.

        Raises:
            LedgerError: it cannot be read now.
        """
        return await self._reader.call(self.tail.between, first, last)

    async def _until_due(self, looked_s: float) -> None:
        """Wait for something new, for the first watcher, or for the time of the next status."""
        if not self.num_watchers:
            await self.written.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._watched.wait()
            return
        await self.written.wait(max(0.0, self._status_at_s + STATUS_S - time.monotonic()))
        await asyncio.sleep(max(0.0, looked_s + LOOK_S - time.monotonic()))

    async def _ask(self) -> None:
        self._status_at_s = time.monotonic()
        controller = self.reach.controller
        status = await self.reach.ask(controller.status())
        reports = await self.reach.ask(controller.newest_reports())
        self.status = told_status(status)
        self.status["ranks"] = self._told_ranks(reports)
        self.status["events"] = list(self.tail.events)
        self.status["skipped_steps"] = self.tail.num_skipped
        text = json.dumps(self.status, separators=(",", ":"))
        if text != self._status_text:
            self._status_text = text
            self._status_version += 1

    def _told_ranks(self, reports: tuple[StepReport, ...]) -> dict[str, Any]:
        """Return the ranks' figures, those that wait longest for data first."""
        present = {report.rank for report in reports}
        self._ranks = {rank: held for rank, held in self._ranks.items() if rank in present}
        for report in reports:
            if report.step_s <= 0:
                continue
            new = [
                float(report.tokens.sum()) / report.step_s,
                min(1.0, report.data_wait_s / report.step_s),
                report.step_s,
            ]
            old = self._ranks.get(report.rank, new)
            self._ranks[report.rank] = [0.7 * a + 0.3 * b for a, b in zip(old, new, strict=True)]
        by_wait = sorted(self._ranks.items(), key=lambda item: (-round(item[1][1], 2), item[0]))
        listed = sorted(by_wait[:MAX_LISTED])
        return {
            "count": len(self._ranks),
            "rows": [[rank, *(float(f"{value:.4g}") for value in held)] for rank, held in listed],
        }

    def stop(self) -> None:
        """Let watchers go."""
        self._stopping = True
        self._changed.notify()
        self._reader.close(1.0)

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events, until the page stops being served."""
        self.num_watchers += 1
        self._watched.set()
        self.written.ring()
        version: int | None = None
        told = -1
        try:
            while not self._stopping:
                seen = self._changed.count
                if version is None or self.tail.series.version != version:
                    version, text = self._points(version)
                    yield f"event: points\ndata: {text}\n\n"
                if self._status_text and told != self._status_version:
                    told = self._status_version
                    yield f"event: status\ndata: {self._status_text}\n\n"
                await self._changed.wait_beyond(seen, BEAT_S)
                if self._changed.count == seen:
                    yield ": still here\n\n"
        finally:
            self.num_watchers -= 1
            if not self.num_watchers:
                self._watched.clear()

    def _points(self, since: int | None) -> tuple[int, str]:
        """Return the points that changed after a version, and the version that they bring to.

        Watchers mostly ask for the same, which is then put together once.
        """
        series = self.tail.series
        key = (since, series.version)
        if self._packed is None or self._packed[0] != key:
            told = series.news(since, most=MAX_BUCKETS)
            told.update(step=self.tail.newest_step, heat=self.tail.heat.step)
            text = json.dumps(told, separators=(",", ":"))
            self._packed = (since, told["version"]), told["version"], text
        return self._packed[1], self._packed[2]


def _state(worker: WorkerStatus) -> str:
    if not worker.alive:
        return "lost"
    if worker.is_silent:
        return "silent"
    return "leaving" if worker.leaving else "serving"


def told_status(status: RunStatus) -> dict[str, Any]:
    """Return a status as JSON values, in the order of the run's domains, lists cut short."""
    workers = sorted(status.workers, key=lambda worker: (worker.alive, worker.worker_id))
    return {
        "phase": status.phase,
        "policy": status.policy,
        "policy_phase": status.policy_phase,
        "observed_step": status.observed_step,
        "sealed_through": status.sealed_through,
        "generation": status.generation,
        "world_size": status.world_size,
        "plan_version": status.plan_version,
        "frozen": status.frozen,
        "ledger_fault": status.ledger_fault,
        "mixture": [float(f"{share:.6g}") for share in status.mixture.shares],
        "loss": [float(f"{loss:.5g}") if math.isfinite(loss) else None for loss in status.loss],
        "tokens": status.tokens,
        "tokens_per_s": float(f"{status.tokens_per_s:.4g}"),
        "data_wait_share": float(f"{status.data_wait_share:.4g}"),
        "degraded_steps": status.degraded_steps,
        "missing_reports": status.missing_reports,
        "held_decisions": status.held_decisions,
        "decision_ms": [
            float(f"{status.decision_ms_p50:.3g}"),
            float(f"{status.decision_ms_p99:.3g}"),
        ],
        "wanted_workers": status.wanted_workers,
        "lanes_moved": status.lanes_moved,
        "num_workers": [sum(worker.alive for worker in workers), len(workers)],
        "workers": [
            {
                "id": worker.worker_id[:80],
                "endpoint": worker.endpoint[:120],
                "state": _state(worker),
                "lanes": len(worker.lanes),
                "cache_bytes": worker.cache_bytes,
                "stall_s": float(f"{worker.stall_s:.4g}"),
                "sequences": worker.sequences_served,
            }
            for worker in workers[:MAX_LISTED]
        ],
        "num_quarantines": len(status.quarantines),
        "quarantines": [
            [each.domain, each.shard[-200:], each.sample, each.reason[:300]]
            for each in status.quarantines[-MAX_LISTED:]
        ],
        "shadows": [
            {
                "name": shadow.name,
                "phase": shadow.phase,
                "shares": [float(f"{share:.5g}") for share in shadow.shares],
                "fault": shadow.fault,
            }
            for shadow in status.shadows
        ],
    }
