"""A closed step on its way to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from controller.aggregate import Aggregator, cursors_after
from controller.decide import json_shares
from controller.ledger_schema import Entry, Kind, cursors_entry, observation_body
from controller.metrics import Metrics
from controller.observation import StepObservation
from protos.types import Step, StepReport


class StepRow:
    """What is known of a step, gathered while it is decided upon."""

    def __init__(
        self, group: Aggregator, observation: StepObservation, reports: list[StepReport]
    ) -> None:
        self.group = group
        self.observation = observation
        self.reports = reports
        self.proposed_step: Step | None = None
        """The policy observed the step and proposed for this one; None: it did neither."""

        self.proposal: tuple[float, ...] | None = None
        self.decision_ms = 0.0

    def entries(
        self, metrics: Metrics, reasons: Sequence[str], *, policy_phase: str = ""
    ) -> list[Entry]:
        """Return the records of the step."""
        reports, step = self.reports, self.observation.step
        body: dict[str, Any] = {
            "generation": self.group.generation,
            "world_size": self.group.world_size,
            "observation": observation_body(self.observation),
            "to_policy": self.proposed_step is not None,
            "proposed_step": self.proposed_step if self.proposed_step is not None else -1,
            "proposal": json_shares(self.proposal),
            "policy_phase": policy_phase,
            "reasons": list(reasons),
            "decision_ms": self.decision_ms,
            # As the ranks had it, which in a degraded step need not be what the ledger says.
            "executed_plan_versions": sorted({report.plan_version for report in reports}),
            "degraded": any(report.degraded for report in reports),
            "step_s": max((report.step_s for report in reports), default=0.0),
            "data_wait_s": max((report.data_wait_s for report in reports), default=0.0),
            "probe_s": max((report.probe_s for report in reports), default=0.0),
            "totals": metrics.totals.as_json(),
        }
        entries = [Entry(kind=Kind.STEP, step=step, body=body)]
        if cursors := cursors_after(reports):
            entries.append(cursors_entry(step, cursors, self.group.generation))
        return entries
