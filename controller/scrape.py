"""The figures for Prometheus: names, units and labels; deploy/docs/metrics.md lists them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from controller.metrics import Histogram, Metrics
from protos.status import RunStatus

MOST_WORKERS = 256
"""Workers that have figures of their own; more are counted in `headrace_workers` alone."""

LOST_SHOWN_S = 600.0
"""A worker that was lost is named for so long: it may come back, and somebody looks for it."""

Kind = Literal["gauge", "counter", "histogram"]
Value = float | Histogram
Sample = tuple[tuple[str, ...], Value]
"""The labels beside `run`, and the value."""

RUN = "run"
"""The label that every metric has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What is exported under a name."""

    name: str
    """Of a counter with its `_total`."""

    kind: Kind
    unit: str
    labels: tuple[str, ...]
    """Beside `run`."""

    what: str

    def family(self, run: str, samples: Sequence[Sample]) -> Any:
        """Return the samples as prometheus_client takes them; what is not a number is left out."""
        labels = [RUN, *self.labels]
        if self.kind == "histogram":
            made = HistogramMetricFamily(self.name, self.what, labels=labels)
            for values, value in samples:
                assert isinstance(value, Histogram)
                bounds = [*map(repr, value.bounds), "+Inf"]
                buckets = list(zip(bounds, accumulate(value.counts), strict=True))
                made.add_metric([run, *values], buckets=buckets, sum_value=value.total)
            return made
        kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        made = kinds[self.kind](self.name, self.what, labels=labels)
        for values, value in samples:
            assert not isinstance(value, Histogram)
            if math.isfinite(value):
                made.add_metric([run, *values], value)
        return made


def _metric(name: str, kind: Kind, unit: str, what: str, *labels: str) -> Metric:
    return Metric(name=f"headrace_{name}", kind=kind, unit=unit, labels=labels, what=what)


METRICS = (
    _metric("run_info", "gauge", "", "Always 1; names the policy.", "policy"),
    _metric("planned_steps", "gauge", "steps", "Steps that the run is planned for."),
    _metric("observed_step", "gauge", "step", "Last step that was decided upon; -1: none."),
    _metric("sealed_step", "gauge", "step", "Last step whose plan is final; -1: none."),
    _metric("plan_version", "gauge", "", "Version of the newest plan."),
    _metric("generation", "gauge", "", "Number of the membership of ranks; 0: none yet."),
    _metric("ranks", "gauge", "ranks", "Data-parallel ranks of the membership."),
    _metric("mixture_share", "gauge", "share", "Share of the newest plan.", "domain"),
    _metric("domain_loss_nats", "gauge", "nats/token", "Loss where a step had it last.", "domain"),
    _metric(
        "domain_sequences_total", "counter", "sequences", "Delivered, since the start.", "domain"
    ),
    _metric("domain_tokens_total", "counter", "tokens", "Trained on, since the start.", "domain"),
    _metric("tokens_total", "counter", "tokens", "Trained on in the whole run."),
    _metric("tokens_per_second", "gauge", "tokens/s", "Over the last 64 steps."),
    _metric(
        "rank_seconds_total",
        "counter",
        "seconds",
        "Ranks' time in the whole run, added up: step, and of it data_wait and probe.",
        "part",
    ),
    _metric("step_seconds", "histogram", "seconds", "A step of the slowest rank."),
    _metric("decision_seconds", "histogram", "seconds", "From last report to announcement."),
    _metric("degraded_steps_total", "counter", "steps", "Composed without the controller."),
    _metric("missing_reports_total", "counter", "reports", "That did not come in time."),
    _metric("held_decisions_total", "counter", "decisions", "In which the guard held the plan."),
    _metric("frozen", "gauge", "0 or 1", "An operator holds the mixture."),
    _metric("drained", "gauge", "0 or 1", "The run is over, or was told to be."),
    _metric("ledger_writable", "gauge", "0 or 1", "0: nothing is decided."),
    _metric("quarantined", "gauge", "shards and samples", "Left out of the data.", "domain"),
    _metric("workers", "gauge", "workers", "Loader workers by state: alive, lost.", "state"),
    _metric("workers_wanted", "gauge", "workers", "0: nobody has said."),
    _metric("lanes_moved_total", "counter", "lanes", "From worker to worker, since the start."),
    _metric("worker_lanes", "gauge", "lanes", "That a worker serves.", "worker"),
    _metric("worker_cache_bytes", "gauge", "bytes", "Token shards on its disk.", "worker"),
    _metric("worker_stall_seconds_total", "counter", "seconds", "Waited for its shards.", "worker"),
    _metric("worker_sequences_total", "counter", "sequences", "Served by a worker.", "worker"),
    _metric(
        "worker_silent_seconds",
        "gauge",
        "seconds",
        "Since a worker was last heard; also of workers lost in the last ten minutes.",
        "worker",
    ),
    _metric("shadow_failed", "gauge", "0 or 1", "A shadow policy proposed nothing.", "shadow"),
)


def families(status: RunStatus, metrics: Metrics) -> list[Any]:
    """Return everything as prometheus_client takes it."""
    samples = dict(_samples(status, metrics))
    return [metric.family(status.run_id, samples[metric.name]) for metric in METRICS]


def _samples(status: RunStatus, metrics: Metrics) -> Iterator[tuple[str, list[Sample]]]:
    def one(name: str, value: Value) -> tuple[str, list[Sample]]:
        return f"headrace_{name}", [((), value)]

    def by(name: str, labels: Sequence[str], values: Sequence[float]) -> tuple[str, list[Sample]]:
        pairs = zip(labels, values, strict=True)
        return f"headrace_{name}", [((label,), float(value)) for label, value in pairs]

    domains, totals = status.domains, metrics.totals
    yield by("run_info", [status.policy], [1])
    yield one("planned_steps", status.num_steps)
    yield one("observed_step", status.observed_step)
    yield one("sealed_step", status.sealed_through)
    yield one("plan_version", status.plan_version)
    yield one("generation", status.generation)
    yield one("ranks", status.world_size)
    yield by("mixture_share", domains, status.mixture.shares)
    yield by("domain_loss_nats", domains, status.loss)
    yield by("domain_sequences_total", domains, metrics.domain_sequences.tolist())
    yield by("domain_tokens_total", domains, metrics.domain_tokens.tolist())
    yield one("tokens_total", status.tokens)
    yield one("tokens_per_second", status.tokens_per_s)
    parts = {"step": totals.step_s, "data_wait": totals.data_wait_s, "probe": totals.probe_s}
    yield by("rank_seconds_total", list(parts), list(parts.values()))
    yield one("step_seconds", metrics.steps)
    yield one("decision_seconds", metrics.decisions)
    for name in ("degraded_steps", "missing_reports", "held_decisions"):
        yield one(f"{name}_total", getattr(status, name))
    yield one("frozen", status.frozen)
    yield one("drained", status.phase == "drained")
    yield one("ledger_writable", not status.ledger_fault)
    left_out = dict.fromkeys(domains, 0)
    for quarantine in status.quarantines:
        if quarantine.domain in left_out:
            left_out[quarantine.domain] += 1
    yield by("quarantined", domains, list(left_out.values()))
    yield from _worker_samples(status)
    faults = [float(bool(shadow.fault)) for shadow in status.shadows]
    yield by("shadow_failed", [shadow.name for shadow in status.shadows], faults)


def _worker_samples(status: RunStatus) -> Iterator[tuple[str, list[Sample]]]:
    alive = [worker for worker in status.workers if worker.alive]
    lost = [worker for worker in status.workers if not worker.alive and not worker.leaving]
    yield (
        "headrace_workers",
        [(("alive",), float(len(alive))), (("lost",), float(len(lost)))],
    )
    yield "headrace_workers_wanted", [((), float(status.wanted_workers))]
    yield "headrace_lanes_moved_total", [((), float(status.lanes_moved))]
    # Workers that have gone are in no series: their names would only grow in number.
    shown = alive[:MOST_WORKERS]
    figures: dict[str, list[float]] = {
        "lanes": [len(worker.lanes) for worker in shown],
        "cache_bytes": [worker.cache_bytes for worker in shown],
        "stall_seconds_total": [worker.stall_s for worker in shown],
        "sequences_total": [worker.sequences_served for worker in shown],
    }
    for name, values in figures.items():
        pairs = zip(shown, values, strict=True)
        yield (
            f"headrace_worker_{name}",
            [((worker.worker_id,), float(value)) for worker, value in pairs],
        )
    heard = [*alive, *(worker for worker in lost if worker.silent_s < LOST_SHOWN_S)]
    # Of too many workers those that have been silent for longest are worth a name.
    heard.sort(key=lambda worker: -worker.silent_s)
    silent = [((worker.worker_id,), worker.silent_s) for worker in heard[:MOST_WORKERS]]
    yield "headrace_worker_silent_seconds", [*silent]
