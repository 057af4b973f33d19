"""The reporter never makes a step wait, and counts what it loses."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protos.errors import ControllerUnreachable, HeadraceError, InvalidMessage, StaleGeneration
from protos.retry import Retry
from protos.types import Generation, Lane, Rank, ReportAnswer, Step, StepReport
from tests.fakes_trainer import wait_until
from trainer_client.device_copy import HostCopy
from trainer_client.reporter import PendingReport, Reporter, ReporterState

ANSWER = ReportAnswer(plan_version=1, sealed_through=3, counted=True)
QUICK = Retry(first_wait_s=0.001, max_wait_s=0.002)


def pending(step: int, *, losses: torch.Tensor | None = None) -> PendingReport:
    report = StepReport(
        generation=Generation(1),
        rank=Rank(0),
        step=Step(step),
        plan_version=0,
        sequences=np.ones(2, np.int64),
        tokens=np.zeros(2, np.int64),
        loss_sum=np.zeros(2),
    )
    if losses is None:
        losses = torch.tensor([[1.5, 3.0], [2.5, 4.0]], dtype=torch.float64)
    return PendingReport(report=report, losses=HostCopy(losses), probe=None)


class Controller:
    """Takes reports; can be told to hang or to fail."""

    def __init__(self) -> None:
        self.taken: list[StepReport] = []
        self.calls: list[list[int]] = []
        self.refused: set[int] = set()
        self.errors: list[HeadraceError] = []
        self.asked = threading.Event()
        self.answer = threading.Event()
        self.answer.set()

    def report(self, reports: Sequence[StepReport], timeout_s: float) -> ReportAnswer:
        self.asked.set()
        assert self.answer.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        if any(report.step in self.refused for report in reports):
            raise InvalidMessage("no such step")
        self.calls.append([report.step for report in reports])
        self.taken.extend(reports)
        return ANSWER


@contextmanager
def reporting(
    send: Callable[[Sequence[StepReport], float], ReportAnswer],
    *,
    capacity: int = 4,
    budget_s: float = 5.0,
) -> Iterator[Reporter]:
    reporter = Reporter(send, capacity=capacity, budget_s=budget_s, retry=QUICK)
    try:
        yield reporter
    finally:
        reporter.close(timeout_s=5.0)


def test_reports_arrive_in_order_with_the_numbers_from_the_device() -> None:
    controller = Controller()
    with reporting(controller.report) as reporter:
        for step in range(4):
            assert reporter.offer(pending(step))
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (4, 0)
    assert [report.step for report in controller.taken] == [0, 1, 2, 3]
    assert controller.taken[0].loss_sum.tolist() == [1.5, 2.5]
    assert controller.taken[0].tokens.tolist() == [3, 4]


def test_a_domain_whose_loss_is_not_finite_is_left_out_and_the_others_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    with caplog.at_level(logging.WARNING), reporting(controller.report) as reporter:
        losses = torch.tensor([[float("nan"), 3.0], [2.5, 4.0]], dtype=torch.float64)
        reporter.offer(pending(7, losses=losses))
        assert reporter.flush(timeout_s=5)
    assert controller.taken[0].loss_sum.tolist() == [0.0, 2.5]
    assert controller.taken[0].tokens.tolist() == [0, 4]
    assert "step=7" in caplog.text
    assert "without the losses of domains [0]" in caplog.text


def test_a_controller_that_hangs_costs_reports_and_no_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    controller.answer.clear()
    with caplog.at_level(logging.WARNING), reporting(controller.report) as reporter:
        assert reporter.offer(pending(0))
        assert controller.asked.wait(5)  # so it is no longer in the queue
        assert [reporter.offer(pending(step)) for step in range(1, 11)] == [True] * 4 + [False] * 6
        assert reporter.num_dropped == 6
        assert not reporter.flush(timeout_s=0.01)
        controller.answer.set()
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (5, 6)
    # One warning a minute, whatever happens.
    assert [record.message for record in caplog.records] == [
        "report rank=0 step=5 (1 such since the last warning) lost: 4 reports are waiting already"
    ]


def _place(step: int) -> dict[Lane, NDArray[np.uint32]]:
    return {Lane(0): np.full((2, 3), step, np.uint32)}


def test_what_has_come_to_wait_leaves_together_with_the_newest_places() -> None:
    controller = Controller()
    controller.answer.clear()
    with reporting(controller.report, capacity=8) as reporter:
        for step in range(5):
            before = pending(step)
            report = dataclasses.replace(before.report, cursors=_place(step))
            reporter.offer(dataclasses.replace(before, report=report))
            assert controller.asked.wait(5)
        controller.answer.set()
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (5, 0)
    assert controller.calls == [[0], [1, 2, 3, 4]]
    assert [sorted(report.cursors) for report in controller.taken] == [[0], [], [], [], [0]]
    assert controller.taken[4].cursors[Lane(0)][0, 0] == 4
    assert controller.taken[2].loss_sum.tolist() == [1.5, 2.5]


class _NotHere(HostCopy):
    """Numbers that stay on the device until they are waited for."""

    def is_here(self) -> bool:
        return False


def test_a_report_does_not_wait_for_the_numbers_of_a_later_one() -> None:
    controller = Controller()
    controller.answer.clear()
    with reporting(controller.report, capacity=8) as reporter:
        for step in range(4):
            item = pending(step)
            if step == 2:
                losses = _NotHere(torch.ones((2, 2), dtype=torch.float64))
                item = dataclasses.replace(item, losses=losses)
            reporter.offer(item)
            assert controller.asked.wait(5)
        controller.answer.set()
        assert reporter.flush(timeout_s=5)
    assert controller.calls == [[0], [1], [2], [3]]


def test_one_report_that_is_refused_does_not_take_the_others_with_it() -> None:
    controller = Controller()
    controller.answer.clear()
    controller.refused = {2}
    with reporting(controller.report, capacity=8) as reporter:
        for step in range(5):
            reporter.offer(pending(step))
            assert controller.asked.wait(5)
        controller.answer.set()
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (4, 1)
    assert [report.step for report in controller.taken] == [0, 1, 3, 4]


def test_a_group_that_nobody_answers_loses_its_oldest_report_only() -> None:
    controller = Controller()
    controller.answer.clear()
    with reporting(controller.report, capacity=8, budget_s=0.0) as reporter:
        for step in range(4):
            reporter.offer(pending(step))
            assert controller.asked.wait(5)
        controller.errors = [ControllerUnreachable("down"), ControllerUnreachable("down")]
        controller.answer.set()
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (2, 2)
    assert controller.calls == [[2, 3]]


def test_what_may_be_repeated_is_repeated() -> None:
    controller = Controller()
    controller.errors = [ControllerUnreachable("down"), ControllerUnreachable("down")]
    with reporting(controller.report) as reporter:
        reporter.offer(pending(0))
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (1, 0)


def test_what_was_refused_is_dropped_and_the_next_one_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    controller.errors = [InvalidMessage("loss_sum[0] is nan")]
    with caplog.at_level(logging.WARNING), reporting(controller.report) as reporter:
        reporter.offer(pending(0))
        assert reporter.flush(timeout_s=5)
        reporter.offer(pending(1))
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (1, 1)
    assert "loss_sum[0] is nan" in caplog.text


def test_a_controller_that_stays_away_costs_one_report_a_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    controller.errors = [ControllerUnreachable("down")] * 10_000
    with caplog.at_level(logging.WARNING), reporting(controller.report, budget_s=0.02) as reporter:
        reporter.offer(pending(0))
        assert reporter.flush(timeout_s=5)
        assert (reporter.num_sent, reporter.num_dropped) == (0, 1)


def test_a_fenced_reporter_sends_no_more_and_training_may_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    controller.errors = [StaleGeneration("generation 2 has begun")]
    with caplog.at_level(logging.WARNING), reporting(controller.report) as reporter:
        reporter.offer(pending(0))
        assert reporter.flush(timeout_s=5)
        assert reporter.state is ReporterState.FENCED
        assert not reporter.offer(pending(1))
        assert (reporter.num_sent, reporter.num_dropped) == (0, 2)
    assert controller.taken == []
    assert "generation 2 has begun" in caplog.text


def test_closing_ends_the_thread_and_counts_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    controller.answer.clear()
    with caplog.at_level(logging.WARNING), reporting(controller.report) as reporter:
        reporter.offer(pending(0))
        assert controller.asked.wait(5)
        reporter.offer(pending(1))
        reporter.close(timeout_s=0.01)
        assert reporter.state is ReporterState.CLOSED
        assert reporter.num_dropped == 1
        controller.answer.set()
        reporter._thread.join(5)
        assert not reporter._thread.is_alive()
        reporter.close()


def test_closing_ends_the_tries_of_a_report_that_nobody_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller()
    controller.errors = [ControllerUnreachable("down")] * 1_000_000
    slow = Retry(first_wait_s=30.0, max_wait_s=30.0)
    with caplog.at_level(logging.WARNING):
        reporter = Reporter(controller.report, budget_s=600.0, retry=slow)
        reporter.offer(pending(0))
        assert controller.asked.wait(5)
        reporter.close(timeout_s=0.01)
        reporter._thread.join(5)
        assert not reporter._thread.is_alive()
        assert reporter.num_dropped == 1
        assert len(controller.errors) >= 1_000_000 - 2


class Restarted(Controller):
    """A controller that decides as it is told to, and has a number."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 1
        self.observed_through = -1

    def report(self, reports: Sequence[StepReport], timeout_s: float) -> ReportAnswer:
        answer = super().report(reports, timeout_s)
        return dataclasses.replace(answer, epoch=self.epoch, observed_through=self.observed_through)


def test_what_a_dead_controller_had_not_decided_goes_to_the_next_one_with_the_next_report() -> None:
    controller = Restarted()
    with reporting(controller.report) as reporter:
        for step in range(3):
            controller.observed_through = step - 2
            assert reporter.offer(pending(step))
            assert reporter.flush(timeout_s=5)
        controller.epoch, controller.observed_through = 2, 0
        assert reporter.offer(pending(3))
        assert reporter.flush(timeout_s=5)
        assert controller.calls == [[0], [1], [2], [3], [1, 2]]


def test_an_undecided_report_is_sent_again_though_no_other_follows_it() -> None:
    controller = Restarted()
    with reporting(controller.report) as reporter:
        assert reporter.offer(pending(0))
        assert reporter.flush(timeout_s=5)
        # Training waits for the decision that died with the controller: no report will come.
        controller.epoch = 2
        wait_until(lambda: len(controller.calls) >= 2)
        assert controller.calls[1] == [0]
        controller.observed_through = 0
        wait_until(lambda: len(reporter._unsettled) == 0)
    assert (reporter.num_sent, reporter.num_dropped) == (1, 0)


def test_a_controller_that_has_no_number_is_sent_nothing_twice() -> None:
    controller = Controller()
    with reporting(controller.report) as reporter:
        for step in range(3):
            assert reporter.offer(pending(step))
            assert reporter.flush(timeout_s=5)
        assert len(reporter._unsettled) == 0
    assert [report.step for report in controller.taken] == [0, 1, 2]
