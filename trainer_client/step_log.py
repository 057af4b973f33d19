"""What a rank's report says of a step, for a trainer's own log: `connect(log_fn=...)`.

`trainer_client.integrations.logs` has such functions for TensorBoard, Weights & Biases, Trackio and
MLflow.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from protos.types import StepReport

logger = logging.getLogger(__name__)

_WARNINGS_APART_S = 60.0


class LogFn(Protocol):
    """Takes a step's figures; called on the reporter's thread, in the order of steps.

    The training step never waits for it. What it raises is a warning, at most one a minute.
    """

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step; all are finite."""


def step_metrics(report: StepReport, domains: Sequence[str]) -> dict[str, float]:
    """Return a step's figures, as this rank saw it.

    mean_loss           mean over the rank's labels, nats a token; absent where it counted none
    loss/DOMAIN         the same of a domain; absent where the rank's rows had none of it
    share/DOMAIN        part of the rank's sequences
    tokens              labels that counted in the loss
    tokens_per_s        the rank's own
    step_s              seconds from the end of the step before to the end of this one
    data_wait_s         of them, waiting for data
    probe_s             of them, in the gradient probe
    plan_version        the plan that the step was composed by
    degraded            1 where it was composed without the controller's word, else 0
    """
    tokens, loss_sum = report.tokens.tolist(), report.loss_sum.tolist()
    sequences = report.sequences.tolist()
    total, num_sequences = sum(tokens), max(sum(sequences), 1)
    metrics = {
        "tokens": float(total),
        "step_s": report.step_s,
        "data_wait_s": report.data_wait_s,
        "probe_s": report.probe_s,
        "plan_version": float(report.plan_version),
        "degraded": float(report.degraded),
    }
    if total:
        metrics["mean_loss"] = sum(loss_sum) / total
    if report.step_s > 0:
        metrics["tokens_per_s"] = total / report.step_s
    for domain, count, nats, delivered in zip(domains, tokens, loss_sum, sequences, strict=True):
        metrics[f"share/{domain}"] = delivered / num_sequences
        if count:
            metrics[f"loss/{domain}"] = nats / count
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def step_log(log_fn: LogFn | None, domains: Sequence[str]) -> Callable[[StepReport], None] | None:
    """Return what hears each report before it is sent, and logs it once; None: nobody listens."""
    return None if log_fn is None else _StepLog(log_fn, domains).hear


class _StepLog:
    def __init__(self, log_fn: LogFn, domains: Sequence[str]) -> None:
        self._log_fn = log_fn
        self._domains = domains
        self._newest = -1
        self._warned_at = -math.inf

    def hear(self, report: StepReport) -> None:
        # A report that is put back for another try is heard again.
        if report.step <= self._newest:
            return
        self._newest = report.step
        try:
            self._log_fn(int(report.step), step_metrics(report, self._domains))
        except Exception as error:
            if time.monotonic() - self._warned_at >= _WARNINGS_APART_S:
                self._warned_at = time.monotonic()
                logger.warning(
                    "log_fn failed rank=%d step=%d: %s: %s",
                    report.rank,
                    report.step,
                    type(error).__name__,
                    error,
                )
