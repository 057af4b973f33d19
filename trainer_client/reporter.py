"""The thread that sends reports: a step hands one over and never waits."""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.errors import HeadraceError, Retryable, StaleGeneration
from protos.retry import Retry
from protos.types import ReportAnswer, StepReport
from trainer_client.device_copy import HostCopy
from trainer_client.policy_inputs import StepInputs
from trainer_client.probe import ProbeStep
from trainer_client.retry import until_answered
from trainer_client.unsettled import CONFIRM_S, Unsettled

logger = logging.getLogger(__name__)

_WARNINGS_APART_S = 60.0
_CALL_TIMEOUT_S = 5.0

MOST_IN_A_CALL = 64
"""Reports that leave together when steps are shorter than a call."""

CAPACITY = 16 * MOST_IN_A_CALL
"""Reports that may wait: more than the steps that a controller seals ahead of the last one."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PendingReport:
    """A report some of whose numbers are still on the device or with other ranks."""

    report: StepReport
    losses: HostCopy | None
    probe: ProbeStep | None
    inputs: StepInputs | None = None

    def is_resolved(self) -> bool:
        """Say whether `resolve` would return at once."""
        is_here = self.losses is None or self.losses.is_here()
        return self.probe is None and is_here and (self.inputs is None or self.inputs.is_here())

    def resolve(self, *, timeout_s: float) -> tuple[StepReport, list[str]]:
        """Wait for the numbers; return the report, and what had to be left out of it.

        A controller refuses a report with a number that is not finite, and then waits for a better
        one; so what is not finite is left out here, and the rest counts.
        """
        changes: dict[str, object] = {}
        left_out: list[str] = []
        if self.losses is not None:
            sums = self.losses.wait().copy()
            broken = ~np.isfinite(sums).all(axis=1)
            if broken.any():
                left_out.append(f"the losses of domains {np.flatnonzero(broken).tolist()}")
                sums[broken] = 0
            changes |= {"loss_sum": sums[:, 0], "tokens": sums[:, 1].astype(np.int64)}
        if self.inputs is not None:
            tokens = changes.get("tokens", self.report.tokens)
            changes |= self.inputs.resolve(np.asarray(tokens), left_out)
        if self.probe is not None:
            changes["probe_s"] = self.probe.probe_s
            changes |= _norms(self.probe, left_out)
            changes |= _alignment(self.probe, timeout_s, left_out)
            changes |= _parts(self.probe, self.report.sequences, left_out)
        return dataclasses.replace(self.report, **changes), left_out  # type: ignore[arg-type]


def _norms(probe: ProbeStep, left_out: list[str]) -> dict[str, object]:
    if probe.norms is None:
        return {}
    weights, updates = probe.norms.wait()
    if not (np.isfinite(weights).all() and np.isfinite(updates).all()):
        left_out.append("norms that are not finite")
        return {}
    return {"weight_norms": tuple(weights.tolist()), "update_norms": tuple(updates.tolist())}


def _parts(
    probe: ProbeStep, sequences: NDArray[np.int64], left_out: list[str]
) -> dict[str, object]:
    if probe.lacks_parts:
        left_out.append("the norms of sequences' gradients, which cannot be told apart here")
    if probe.part_squares is None:
        return {}
    squares = probe.part_squares.wait()
    if not np.isfinite(squares).all():
        left_out.append("norms of sequences' gradients that are not finite")
        return {}
    return {"part_square_norms": squares.astype(np.float64), "num_parts": sequences}


def _alignment(probe: ProbeStep, timeout_s: float, left_out: list[str]) -> dict[str, object]:
    if probe.alignment is None:
        return {}
    try:
        part = probe.alignment.wait(timeout_s=timeout_s)
    except RuntimeError as error:
        left_out.append(f"the alignment, since the ranks' sketches did not meet ({error})")
        return {}
    if not np.isfinite(part).all():
        left_out.append("an alignment of gradients that are not finite")
        return {}
    return {"alignment_part": part, "alignment_share": probe.alignment.share}


def _without_earlier_cursors(reports: list[StepReport]) -> list[StepReport]:
    """Leave out places that the last report's replace as soon as they have arrived."""
    *earlier, last = reports
    return [*(dataclasses.replace(report, cursors={}) for report in earlier), last]


class ReporterState(enum.Enum):
    """OPEN -> FENCED -> CLOSED, or OPEN -> CLOSED; never back."""

    OPEN = "open"  # takes and sends
    FENCED = "fenced"  # another generation has begun: takes, counts and drops
    CLOSED = "closed"  # takes nothing


class Reporter:
    """A bounded queue of reports and the daemon thread that sends them.

    caller   call         waits for                    woken by
    trainer  offer        never                        -
    trainer  flush        the queue to run empty       the thread, timeout_s
    thread   its loop     a report                     offer, close

    One call is under way at a time. What has come to wait by its end goes with the next one, so
    that steps shorter than a call cost a part of a call each; a report never waits for a later one.
    Training never stops because of reports: what cannot be sent is dropped, counted and warned of.

    What was answered is kept until its decision is in the ledger, and sent again to a controller
    that has taken another one's place.
    """

    def __init__(
        self,
        send: Callable[[Sequence[StepReport], float], ReportAnswer],
        *,
        capacity: int = CAPACITY,
        budget_s: float = 10.0,
        retry: Retry | None = None,
        heard: Callable[[StepReport], None] | None = None,
    ) -> None:
        self._send = send
        self._heard = heard
        self._capacity = capacity
        self._budget_s = budget_s
        self._retry = retry or Retry(max_wait_s=1.0)
        self._changed = threading.Condition()
        self._queue: deque[PendingReport] = deque()
        self._busy = False
        self._state = ReporterState.OPEN
        self._closing = threading.Event()
        self._warned_at = -math.inf
        self._unwarned = 0
        self.num_sent = 0
        self.num_dropped = 0
        self._unsettled = Unsettled(CAPACITY)
        self._thread = threading.Thread(target=self._run, name="headrace-reporter", daemon=True)
        self._thread.start()

    @property
    def state(self) -> ReporterState:
        """Where the reporter stands in its life."""
        return self._state

    def offer(self, pending: PendingReport) -> bool:
        """Queue a report unless the queue is full; tell whether it was queued."""
        with self._changed:
            if self._state is ReporterState.OPEN and len(self._queue) < self._capacity:
                self._queue.append(pending)
                self._changed.notify_all()
                return True
            reason = (
                f"{self._capacity} reports are waiting already"
                if self._state is ReporterState.OPEN
                else f"reporting is {self._state.value}"
            )
        self._drop(pending.report, reason)
        return False

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until every queued report was sent or dropped; tell whether that happened."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout_s)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Flush for at most `timeout_s` and end; closing twice does no harm."""
        if self._state is not ReporterState.CLOSED:
            self.flush(timeout_s=timeout_s)
        with self._changed:
            self._state = ReporterState.CLOSED
            left, self._queue = list(self._queue), deque()
            self._changed.notify_all()
        self._closing.set()
        for pending in left:
            self._drop(pending.report, "the session was closed")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._state is ReporterState.CLOSED,
                    CONFIRM_S if self._unsettled else None,
                )
                if self._state is ReporterState.CLOSED and not self._queue:
                    return
                group = self._take_group() if self._queue else []
                self._busy = bool(group)
            try:
                if group:
                    self._deliver(group)
                else:
                    self._confirm()
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _take_group(self) -> list[PendingReport]:
        """Take the oldest report, and those after it that are ready to go with it."""
        group = [self._queue.popleft()]
        while (
            self._queue
            and len(group) < MOST_IN_A_CALL
            and group[-1].is_resolved()
            and self._queue[0].is_resolved()
        ):
            group.append(self._queue.popleft())
        return group

    def _deliver(self, group: list[PendingReport]) -> None:
        if self._state is not ReporterState.OPEN:
            self._drop_all(group, f"reporting is {self._state.value}")
            return
        try:
            reports = [self._resolve(pending) for pending in group]
            until_answered(
                lambda left_s: self._call(reports, min(max(left_s, 0.1), _CALL_TIMEOUT_S)),
                budget_s=self._budget_s,
                retry=self._retry,
                wait=self._closing.wait,
            )
        except StaleGeneration as error:
            with self._changed:
                if self._state is ReporterState.OPEN:
                    self._state = ReporterState.FENCED
            self._drop_all(group, str(error))
        except Retryable as error:
            # Time is over for the oldest one only.
            self._drop(group[0].report, str(error))
            self._put_back(group[1:])
        except HeadraceError as error:
            if len(group) == 1:
                self._drop(group[0].report, str(error))
            # One of several was refused; the others must not be lost with it.
            for pending in group if len(group) > 1 else ():
                self._deliver([pending])
        except Exception as error:
            # A thread that dies would drop every later report without a word.
            first = group[0].report
            logger.exception("report failed unexpectedly rank=%d step=%d", first.rank, first.step)
            self._drop_all(group, str(error))
        else:
            self.num_sent += len(group)

    def _call(self, reports: list[StepReport], timeout_s: float) -> None:
        """Send reports; before them, to another controller, what the last one had not decided."""
        answer = self._send(_without_earlier_cursors(reports), timeout_s)
        if self._unsettled.answered(reports, answer):
            earlier = self._unsettled.before(reports)
            for first in range(0, len(earlier), MOST_IN_A_CALL):
                self._send(earlier[first : first + MOST_IN_A_CALL], timeout_s)

    def _confirm(self) -> None:
        """Ask whether what was answered is decided, by sending it again; it does no harm."""
        kept = self._unsettled.before([])
        if not kept:
            return
        try:
            self._call(kept[:MOST_IN_A_CALL], _CALL_TIMEOUT_S)
        except Retryable:
            return  # asked again in a while
        except HeadraceError as error:
            # Its generation has ended, or it would have been counted long ago.
            self._unsettled.clear()
            logger.debug("kept reports are of no use any more: %s", error)

    def _resolve(self, pending: PendingReport) -> StepReport:
        report, left_out = pending.resolve(timeout_s=self._budget_s)
        if left_out:
            self._warn(report, f"sent without {' and '.join(left_out)}")
        if self._heard is not None:
            self._heard(report)
        return report

    def _put_back(self, group: list[PendingReport]) -> None:
        with self._changed:
            if self._state is not ReporterState.CLOSED:
                self._queue.extendleft(reversed(group))
                return
        self._drop_all(group, "the session was closed")

    def _drop_all(self, group: list[PendingReport], reason: str) -> None:
        for pending in group:
            self._drop(pending.report, reason)

    def _drop(self, report: StepReport, reason: str) -> None:
        with self._changed:
            self.num_dropped += 1
        self._warn(report, f"lost: {reason}")

    def _warn(self, report: StepReport, what: str) -> None:
        with self._changed:
            self._unwarned += 1
            now = time.monotonic()
            if now - self._warned_at < _WARNINGS_APART_S:
                return
            num_since, self._unwarned, self._warned_at = self._unwarned, 0, now
        logger.warning(
            "report rank=%d step=%d (%d such since the last warning) %s",
            report.rank,
            report.step,
            num_since,
            what,
        )
