"""Follows a ledger that a controller writes, at a bounded price."""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from controller.dashboard.alignment import HeatMap, rewards_of
from controller.dashboard.series import MAX_POINTS, Point, Series
from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind, Row, step_record_of
from controller.observation import StepObservation

BACKLOG_ROWS = 2048
"""Steps that are read, evenly spread, where a run is long already."""

RANGE_ROWS = MAX_POINTS
"""Steps that are read of a range that somebody looks at more closely."""

CPU_SHARE = 0.01
"""Share of a core that reading on may take."""

MAX_EVENTS = 60
FEWEST_ROWS = 4

_STARTING_COST_S = 0.002


class LedgerTail:
    """Reads what is new into `series`, `heat` and `events`. One thread at a time."""

    def __init__(self, path: Path, num_domains: int) -> None:
        self._path = path
        self._row_cost_s = _STARTING_COST_S
        self._seq = 0
        self._is_fresh = True
        self.series = Series(num_domains)
        self.heat = HeatMap(num_domains)
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        """The newest last."""

        self.newest_step = -1
        self.num_skipped = 0
        """Steps that are in no bucket, because to read all would have cost too much."""

    def read_on(self, elapsed_s: float) -> None:
        """Take in what was written since, no more than `elapsed_s` allows.

        Raises:
            LedgerError: it cannot be read now.
        """
        with reading_ledger(self._path) as database:
            last = _newest_seq(database)
            forks = list(read_rows(database, Kind.FORK))
            if self._is_fresh or any(fork.seq > self._seq for fork in forks):
                self._begin(database)
                most = BACKLOG_ROWS
            else:
                allowed = CPU_SHARE * elapsed_s / self._row_cost_s
                most = max(FEWEST_ROWS, int(allowed))
            self._take_steps(database, last, forks, most)
            self._take_events(database, last)
            self._seq, self._is_fresh = last, False

    def between(self, first: int, last: int) -> Series:
        """Read the steps from `first` to `last`, both included, in a series that begins at `first`.

        No more than `RANGE_ROWS` of them, evenly spread: of fewer each has a point of its own.

        Raises:
            LedgerError: it cannot be read now.
        """
        series = Series(self.series.num_domains)
        with reading_ledger(self._path) as database:
            forks = list(read_rows(database, Kind.FORK))
            found = database.execute(
                "SELECT step, seq FROM ledger WHERE kind = ? AND step >= ? AND step <= ?"
                " ORDER BY step",
                (Kind.STEP.value, first, last),
            )
            seqs = [seq for step, seq in found if not _is_abandoned(step, seq, forks)]
            for seq in _spread(seqs, RANGE_ROWS):
                row = _row(database, seq)
                series.add(_point(row, step_record_of(row).observation, at=row.step - first))
        return series

    def _begin(self, database: sqlite3.Connection) -> None:
        self.series.clear()
        self.heat = HeatMap(self.series.num_domains)
        self.events.clear()
        self._seq, self.num_skipped, self.newest_step = 0, 0, -1

    def _take_steps(
        self, database: sqlite3.Connection, last: int, forks: list[Row], most: int
    ) -> None:
        seqs = [
            seq
            for (seq,) in database.execute(
                "SELECT seq FROM ledger WHERE kind = ? AND seq > ? AND seq <= ? ORDER BY seq",
                (Kind.STEP.value, self._seq, last),
            )
        ]
        chosen = _spread(seqs, most)
        self.num_skipped += len(seqs) - len(chosen)
        began_s = time.thread_time()
        for seq in chosen:
            row = _row(database, seq)
            if not _is_abandoned(row.step, seq, forks):
                self._take(row)
        if chosen:
            cost = (time.thread_time() - began_s) / len(chosen)
            self._row_cost_s = 0.5 * (self._row_cost_s + max(cost, 1e-5))

    def _take(self, row: Row) -> None:
        observation = step_record_of(row).observation
        self.series.add(_point(row, observation, at=row.step))
        self.heat.add(observation)
        self.newest_step = row.step

    def _take_events(self, database: sqlite3.Connection, last: int) -> None:
        newest: list[dict[str, Any]] = []
        for kind in _EVENTS:
            for count, row in enumerate(read_rows(database, kind, newest_first=True)):
                if row.seq <= self._seq or count == MAX_EVENTS:
                    break
                if row.seq <= last:
                    newest.append(_event(row))
        self.events.extend(sorted(newest, key=lambda event: int(event["seq"])))


def _is_abandoned(step: int, seq: int, forks: list[Row]) -> bool:
    """Say whether the run has gone back to before a step since row `seq` told of it."""
    return any(fork.step <= step and fork.seq > seq for fork in forks)


def _point(row: Row, observation: StepObservation, *, at: int) -> Point:
    body = row.body
    step_s, nan = body["step_s"], float("nan")
    return Point(
        step=at,
        planned=observation.planned,
        executed=observation.executed,
        loss=observation.loss,
        reward=rewards_of(observation),
        tokens_per_s=float(observation.tokens.sum()) / step_s if step_s > 0 else nan,
        data_wait_share=min(1.0, body["data_wait_s"] / step_s) if step_s > 0 else nan,
        decision_ms=body["decision_ms"],
        step_s=step_s if step_s > 0 else nan,
    )


def _newest_seq(database: sqlite3.Connection) -> int:
    (last,) = database.execute("SELECT coalesce(max(seq), 0) FROM ledger").fetchone()
    return int(last)


def _row(database: sqlite3.Connection, seq: int) -> Row:
    return next(read_rows(database, Kind.STEP, seq=seq))


def _spread(seqs: list[int], most: int) -> list[int]:
    """Return at most `most` of `seqs`, evenly spread, with the last one."""
    if len(seqs) <= most:
        return seqs
    places = np.linspace(0, len(seqs) - 1, most).astype(np.int64)
    return [seqs[place] for place in np.unique(places)]


_EVENTS = (Kind.EVENT, Kind.AMEND, Kind.GENERATION, Kind.FORK, Kind.CONTROL, Kind.SNAPSHOT)


def _event(row: Row) -> dict[str, Any]:
    """Return what a row says has happened, as a name and details."""
    body = row.body
    told = {"seq": row.seq, "time_s": row.time_s, "step": row.step}
    if row.kind is Kind.GENERATION:
        name, details = "ranks joined", {"ranks": body["world_size"]}
    elif row.kind is Kind.FORK:
        name, details = "went back", {"trained through": body["trained_through"]}
    elif row.kind is Kind.CONTROL:
        is_given_back = body["override_q32"] is None and not body["frozen"]
        held = "frozen" if body["frozen"] else "mixture set"
        name, details = "resumed" if is_given_back else held, {}
    elif row.kind is Kind.AMEND:
        lanes = "all" if body["lanes"] is None else body["lanes"]
        details = {"plan": body["version"], "through": body["through"], "lanes": lanes}
        name = "composed alone"
    elif row.kind is Kind.SNAPSHOT:
        name, details = "policy saved", {}
    else:
        details = {key: value for key, value in body.items() if key != "event"}
        name = body["event"]
    text = ", ".join(f"{key} {value}" for key, value in details.items())
    return {**told, "event": name, "details": text[:400]}
