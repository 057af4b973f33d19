"""A run as curves of a few hundred points, from a ledger of any length, read once."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.ledger import reading_ledger, verify
from controller.ledger_schema import Kind, Row, quarantine_of
from controller.ledger_view import LedgerView
from deploy.reading.columns import Supersession
from protos.errors import LedgerError
from protos.types import SHARE_ONE, Quarantine

Array = NDArray[np.float64]

POINTS = 400
MOST_EVENTS = 200
MOST_FIGURES = 12
"""Diagnostics of a policy that are drawn."""

_TIMES = ("step_s", "data_wait_s", "probe_s", "decision_ms")


@dataclass(kw_only=True, eq=False, slots=True)
class Curves:
    """Sums over the steps of each point; of a step that was trained twice, the newest."""

    run: str
    policy: str
    domains: tuple[str, ...]
    num_rows: int
    first_steps: NDArray[np.int64]
    """[points + 1]: where each point begins; the last: after the last step."""

    count: Array
    """[points]: steps that are known."""

    planned: Array
    """[points, domains]: shares."""

    decided: Array
    """[points, domains]: shares; `decisions` of them."""

    decisions: Array
    sequences: Array
    """[points, domains]"""

    tokens: Array
    """[points, domains]"""

    loss_sum: Array
    """[points, domains]: nats."""

    times: dict[str, Array]
    """[points] of each of step_s, data_wait_s, probe_s (seconds) and decision_ms."""

    degraded: Array
    missing: Array
    figures: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Diagnostics: sums and counts, [points] each."""

    shadows: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """How far shadows' shares are from the plan: sums of half the absolute differences, counts."""

    alignment: dict[str, Array] = field(default_factory=dict)
    """[domains, domains] of the first and the last quarter: inner products of mean gradients."""

    quarantines: list[Quarantine] = field(default_factory=list)
    num_quarantines: int = 0
    events: list[tuple[float, int, str, Mapping[str, Any]]] = field(default_factory=list)
    """Time, step, kind and details of the first ones."""

    num_events: Counter[str] = field(default_factory=Counter)
    num_plans: int = 0
    num_superseded: int = 0
    first_time_s: float = 0.0

    @property
    def steps(self) -> Array:
        """[points]: the middle of each."""
        return (self.first_steps[:-1] + self.first_steps[1:] - 1) / 2

    @property
    def num_steps(self) -> int:
        """How many steps are known."""
        return int(self.count.sum())

    @property
    def loss(self) -> Array:
        """[points, domains]: nats a token; NaN where no step had the domain."""
        seen = self.tokens > 0
        return np.divide(
            self.loss_sum, self.tokens, out=np.full_like(self.tokens, np.nan), where=seen
        )

    @property
    def shares(self) -> Array:
        """[points, domains]: the mean of the plans; NaN where no step is known."""
        return mean(self.planned, self.count[:, None])

    @property
    def realised(self) -> Array:
        """[points, domains]: shares of what was delivered; NaN where nothing was."""
        return mean(self.sequences, self.sequences.sum(axis=1, keepdims=True))


def mean(sums: Array, counts: Array) -> Array:
    """Return sums over counts; NaN where nothing was counted."""
    counts = np.broadcast_to(counts, sums.shape)
    found: Array = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return found


def read_curves(path: Path, *, points: int = POINTS) -> Curves:
    """Read a ledger, also while a controller writes it.

    Raises:
        LedgerError: it is missing or damaged, or holds no run.
    """
    with reading_ledger(path) as database:
        num_rows, _ = verify(database, path)
        view = LedgerView(database)
        run = view.newest(Kind.RUN)
        if run is None:
            raise LedgerError(f"the ledger {path} names no run yet; start its controller first")
        last = next(view.rows(Kind.STEP, min_step=0, newest_first=True), None)
        num_steps = 0 if last is None else last.step + 1
        curves = _empty(run.body, num_rows, num_steps, points)
        reader = _Reader(curves, num_steps, Supersession(view.rows(Kind.FORK)))
        for row in view.rows(*_KINDS):
            reader.take(row)
    reader.finish()
    return curves


_KINDS = (
    *(Kind.RUN, Kind.GENERATION, Kind.FORK, Kind.PLAN, Kind.STEP, Kind.SHADOW, Kind.SKIP),
    *(Kind.AMEND, Kind.CONTROL, Kind.WORKERS, Kind.QUARANTINE, Kind.EVENT),
)


def _empty(run: Mapping[str, Any], num_rows: int, num_steps: int, points: int) -> Curves:
    number, width = max(min(points, num_steps), 1), len(run["domains"])
    zeros, flat = np.zeros((number, width)), np.zeros(number)
    return Curves(
        run=run["run"],
        policy=str(run["settings"].get("policy", {}).get("name", "")),
        domains=tuple(run["domains"]),
        num_rows=num_rows,
        first_steps=np.array([-(-point * num_steps // number) for point in range(number + 1)]),
        count=flat.copy(),
        planned=zeros.copy(),
        decided=zeros.copy(),
        decisions=flat.copy(),
        sequences=zeros.copy(),
        tokens=zeros.copy(),
        loss_sum=zeros.copy(),
        times={name: flat.copy() for name in _TIMES},
        degraded=flat.copy(),
        missing=flat.copy(),
    )


class _Reader:
    """Adds rows up."""

    def __init__(self, curves: Curves, num_steps: int, supersession: Supersession) -> None:
        self._curves = curves
        self._num_steps = num_steps
        self._supersession = supersession
        self._planned: dict[int, Array] = {}
        """Of the steps whose shadows have not been read yet."""

    def take(self, row: Row) -> None:
        curves = self._curves
        curves.first_time_s = curves.first_time_s or row.time_s
        if row.kind is Kind.STEP:
            self._step(row)
        elif row.kind is Kind.SHADOW:
            self._shadow(row)
        elif row.kind is Kind.PLAN:
            curves.num_plans += 1
        elif row.kind is Kind.QUARANTINE:
            curves.num_quarantines += 1
            if len(curves.quarantines) < MOST_EVENTS:
                curves.quarantines.append(quarantine_of(row))
        else:
            self._event(row)

    def finish(self) -> None:
        """Keep the diagnostics that there is room for."""
        figures = self._curves.figures
        for name in sorted(figures)[MOST_FIGURES:]:
            del figures[name]

    def _event(self, row: Row) -> None:
        kind = str(row.body.get("event", row.kind.value))
        self._curves.num_events[kind] += 1
        if len(self._curves.events) < MOST_EVENTS:
            hidden = {"event", "settings", "domains", "attempt_ids", "lanes", "cursor_steps"}
            detail = {name: value for name, value in row.body.items() if name not in hidden}
            self._curves.events.append((row.time_s, row.step, kind, detail))

    def _point(self, step: int) -> int:
        return int(np.searchsorted(self._curves.first_steps, step, side="right")) - 1

    def _step(self, row: Row) -> None:
        curves, body, seen = self._curves, row.body, row.body["observation"]
        if self._supersession.has(row):
            curves.num_superseded += 1
            return
        at = self._point(row.step)
        planned = np.asarray(seen["planned"], np.float64)
        tokens = np.asarray(seen["tokens"], np.float64)
        curves.count[at] += 1
        curves.planned[at] += planned
        curves.sequences[at] += seen["sequences"]
        curves.tokens[at] += tokens
        curves.loss_sum[at] += seen["loss_sum"]
        for name in _TIMES:
            curves.times[name][at] += body.get(name, 0.0)
        curves.degraded[at] += bool(body.get("degraded", False))
        curves.missing[at] += seen["missing_ranks"]
        if body.get("decided_q32") is not None:
            curves.decided[at] += np.asarray(body["decided_q32"], np.float64) / SHARE_ONE
            curves.decisions[at] += 1
            self._planned[row.step] = np.asarray(body["decided_q32"], np.float64) / SHARE_ONE
            # Shadows' rows come soon after their step's, if they come.
            if len(self._planned) > 2 * POINTS:
                del self._planned[next(iter(self._planned))]
        for name, value in (body.get("diagnostics") or {}).items():
            _add(curves.figures, name, at, float(value), len(curves.count))
        if seen["alignment"] is not None:
            self._alignment(row.step, seen["alignment"], tokens)

    def _alignment(self, step: int, packed: str, tokens: Array) -> None:
        quarter = {0: "first", 3: "last"}.get(4 * step // max(self._num_steps, 1))
        if quarter is None:
            return
        number = len(self._curves.domains)
        matrix = np.frombuffer(base64.b64decode(packed), "<f8").reshape(number, number)
        counted = np.maximum(tokens, 1)
        total = self._curves.alignment.setdefault(quarter, np.zeros((number, number)))
        total += matrix / np.outer(counted, counted)

    def _shadow(self, row: Row) -> None:
        if self._supersession.has(row):
            return
        decided, at = self._planned.get(row.step), self._point(row.step)
        for name, shares in row.body["proposals"].items():
            wanted = np.asarray([float(share) for share in shares])
            if decided is not None and np.isfinite(wanted).all():
                away = float(np.abs(wanted - decided).sum() / 2)
                _add(self._curves.shadows, name, at, away, len(self._curves.count))


def _add(
    sums: dict[str, tuple[Array, Array]], name: str, at: int, value: float, points: int
) -> None:
    if np.isfinite(value):
        total, count = sums.setdefault(name, (np.zeros(points), np.zeros(points)))
        total[at] += value
        count[at] += 1
