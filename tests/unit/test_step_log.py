"""`log_fn`: a trainer's own log hears of each step, and nothing of it can hurt the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pytest

from protos.types import Generation, Rank, Step, StepReport
from tests.unit.test_reporter import Controller, pending, reporting
from trainer_client.reporter import Reporter
from trainer_client.step_log import step_log, step_metrics

DOMAINS = ("web", "code")


class Log:
    """Keeps what it hears; fails where it is told to."""

    def __init__(self, *, fails_at: frozenset[int] = frozenset()) -> None:
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []
        self._fails_at = fails_at

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.metrics.append(dict(metrics))
        if step in self._fails_at:
            raise OSError("no space left")


def test_figures_are_means_and_shares_of_the_rank() -> None:
    report = StepReport(
        generation=Generation(1),
        rank=Rank(0),
        step=Step(3),
        plan_version=7,
        sequences=np.array([3, 1]),
        tokens=np.array([30, 0]),
        loss_sum=np.array([60.0, 0.0]),
        step_s=0.5,
        data_wait_s=0.1,
        degraded=True,
    )
    assert step_metrics(report, DOMAINS) == {
        "mean_loss": 2.0,
        "loss/web": 2.0,
        "share/web": 0.75,
        "share/code": 0.25,
        "tokens": 30.0,
        "tokens_per_s": 60.0,
        "step_s": 0.5,
        "data_wait_s": 0.1,
        "probe_s": 0.0,
        "plan_version": 7.0,
        "degraded": 1.0,
    }


def test_every_step_is_heard_once_with_the_numbers_from_the_device() -> None:
    log, controller = Log(), Controller()
    reporter = Reporter(controller.report, heard=step_log(log, DOMAINS))
    for step in range(5):
        reporter.offer(pending(step))
    assert reporter.flush(timeout_s=20)
    reporter.close()
    assert log.steps == list(range(5))
    assert log.metrics[0]["loss/web"] == 0.5
    assert log.metrics[0]["loss/code"] == 0.625
    assert log.metrics[0]["mean_loss"] == pytest.approx(4.0 / 7.0)


def test_a_report_that_is_sent_in_several_tries_is_heard_once() -> None:
    log, controller = Log(), Controller()
    controller.refused = {2}
    controller.answer.clear()
    reporter = Reporter(controller.report, heard=step_log(log, DOMAINS))
    for step in range(6):
        reporter.offer(pending(step))
    controller.answer.set()
    assert reporter.flush(timeout_s=20)
    reporter.close()
    assert log.steps == list(range(6))
    assert [report.step for report in controller.taken] == [0, 1, 3, 4, 5]


def test_a_log_that_fails_is_warned_of_once_and_loses_no_report(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log, controller = Log(fails_at=frozenset(range(4))), Controller()
    with caplog.at_level(logging.WARNING):
        reporter = Reporter(controller.report, heard=step_log(log, DOMAINS))
        for step in range(5):
            reporter.offer(pending(step))
        assert reporter.flush(timeout_s=20)
        reporter.close()
    assert [report.step for report in controller.taken] == list(range(5))
    assert log.steps == list(range(5))
    assert [record.message for record in caplog.records] == [
        "log_fn failed rank=0 step=0: OSError: no space left"
    ]


def test_without_a_log_nothing_is_heard() -> None:
    assert step_log(None, DOMAINS) is None
    controller = Controller()
    with reporting(controller.report) as reporter:
        reporter.offer(pending(0))
        assert reporter.flush(timeout_s=20)
    assert len(controller.taken) == 1
