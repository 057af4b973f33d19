"""A closed step on its way to the ledger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from controller.aggregate import Aggregator, cursors_after
from controller.ledger_schema import Entry, Kind, cursors_entry, observation_body
from controller.metrics import Metrics
from controller.observation import StepObservation
from controller.policy_runner import Advice
from protos.types import Mixture, Step, StepReport


class StepRow:
    """What is known of a step, gathered while it is decided upon."""

    def __init__(
        self,
        group: Aggregator,
        observation: StepObservation,
        reports: list[StepReport],
        *,
        lag: int,
    ) -> None:
        self.group = group
        self.observation = observation
        self.reports = reports
        self._lag = lag
        self.is_open = True
        """Whether a decision follows from the step; False: it is recorded only."""

        self.to_policy = False
        """Whether the policy observed it, and proposed."""

        self.proposals: list[tuple[Step, Advice]] = []
        """The steps to decide upon, in order, with what the policy advises for each."""

        self.decided: Mixture | None = None
        """The mixture of the last of these steps, after the guard; None: it was decided before."""

        self.decision_ms = 0.0

    @property
    def step(self) -> Step:
        """Which one it is."""
        return self.observation.step

    def entries(
        self, metrics: Metrics, reasons: Sequence[str], *, policy_phase: str = ""
    ) -> list[Entry]:
        """Return the records of the step."""
        reports, step = self.reports, self.step
        proposed_step, advice = Step(step + self._lag), Advice(shares=None)
        if self.proposals:
            proposed_step, advice = self.proposals[-1]
        body: dict[str, Any] = {
            "generation": self.group.generation,
            "world_size": self.group.world_size,
            "observation": observation_body(self.observation),
            "to_policy": self.to_policy,
            "proposed_step": proposed_step if self.to_policy else -1,
            "proposal": json_shares(advice.shares) if self.to_policy else None,
            "decided_q32": None if self.decided is None else list(self.decided.shares_q32),
            "policy_phase": policy_phase,
            "diagnostics": dict(advice.diagnostics),
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


def json_shares(shares: Sequence[float] | None) -> list[float | str] | None:
    """Return shares as JSON values, those that are not finite as text."""
    if shares is None:
        return None
    return [share if math.isfinite(share) else str(share) for share in shares]
