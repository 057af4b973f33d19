"""Figures cost as much late in a run as early in it."""

from __future__ import annotations

from controller.metrics import DECISIONS_KEPT, Metrics, Totals


def test_percentiles_look_at_the_newest_decisions_however_many_there_were() -> None:
    metrics = Metrics(2, Totals(), now=lambda: 0.0)
    assert metrics.decision_ms(50) == 0
    for _ in range(100_000):
        metrics.decided(9.0)
    assert len(metrics._decision_ms) == DECISIONS_KEPT
    for number in range(DECISIONS_KEPT):
        metrics.decided(number / 1000)
    assert metrics.decision_ms(50) == (DECISIONS_KEPT - 1) / 2
    assert metrics.decision_ms(99) < DECISIONS_KEPT
    assert sum(metrics.decisions.counts) == 100_000 + DECISIONS_KEPT, "all are counted"
