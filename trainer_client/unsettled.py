"""Reports that were answered, kept until the decision that follows from them is in the ledger.

A controller that dies takes with it what it had not decided upon. The next one shows by its number
that it is another, and is given those reports again; each counts once, however often it comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from protos.types import ReportAnswer, StepReport

CONFIRM_S = 1.0
"""So long after the last answer an undecided report is sent again: if the controller is another one
by now, nobody else would tell, since training may wait for the very decision."""


class Unsettled:
    """Not thread-safe: it belongs to the reporter's thread."""

    def __init__(self, capacity: int) -> None:
        self._kept: deque[StepReport] = deque(maxlen=capacity)
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._kept)

    def before(self, reports: Sequence[StepReport]) -> list[StepReport]:
        """Return what is kept of earlier steps than `reports`."""
        first = min((report.step for report in reports), default=None)
        return [each for each in self._kept if first is None or each.step < first]

    def answered(self, reports: Sequence[StepReport], answer: ReportAnswer) -> bool:
        """Take in an answer; return whether another controller gave it than the one before.

        A controller of before there were such numbers says 0; then nothing is kept.
        """
        is_another = self._epoch not in (0, answer.epoch)
        self._epoch = answer.epoch
        if not answer.epoch:
            self._kept.clear()
            return False
        known = {report.step for report in self._kept}
        self._kept.extend(report for report in reports if report.step not in known)
        while self._kept and self._kept[0].step <= answer.observed_through:
            self._kept.popleft()
        return is_another and bool(self._kept)

    def clear(self) -> None:
        """Forget all: their generation has ended."""
        self._kept.clear()
