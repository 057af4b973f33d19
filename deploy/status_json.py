"""A status as JSON values."""

from __future__ import annotations

import math
from typing import Any

from protos.status import RunStatus

_FIGURES = (
    "wanted_workers",
    "lanes_moved",
    "tokens",
    "tokens_per_s",
    "data_wait_share",
    "degraded_steps",
    "missing_reports",
    "held_decisions",
)
_WORKER_FIGURES = (
    "worker_id",
    "endpoint",
    "alive",
    "lanes",
    "cache_bytes",
    "stall_s",
    "sequences_served",
    "leaving",
    "managed",
    "silent_s",
)


def status_json(status: RunStatus) -> dict[str, Any]:
    """Return a status as JSON values; what was never measured is null."""
    return {
        "run": status.run_id,
        "phase": status.phase,
        "policy": status.policy,
        "policy_phase": status.policy_phase,
        "observed_step": status.observed_step,
        "sealed_through": status.sealed_through,
        "num_steps": status.num_steps,
        "generation": status.generation,
        "world_size": status.world_size,
        "plan_version": status.plan_version,
        "frozen": status.frozen,
        "ledger_fault": status.ledger_fault or None,
        "mixture": dict(zip(status.domains, status.mixture.shares, strict=True)),
        "loss": {
            domain: loss if math.isfinite(loss) else None
            for domain, loss in zip(status.domains, status.loss, strict=True)
        },
        **{name: getattr(status, name) for name in _FIGURES},
        "decision_ms": {
            "p50": _finite(status.decision_ms_p50),
            "p99": _finite(status.decision_ms_p99),
        },
        "quarantines": [
            {"domain": q.domain, "shard": q.shard, "sample": q.sample, "reason": q.reason}
            for q in status.quarantines
        ],
        "shadows": [
            {
                "name": shadow.name,
                "phase": shadow.phase,
                "mixture": dict(zip(status.domains, shadow.shares, strict=True))
                if shadow.shares
                else None,
                "fault": shadow.fault,
            }
            for shadow in status.shadows
        ],
        "workers": [
            {name: getattr(worker, name) for name in _WORKER_FIGURES} for worker in status.workers
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
