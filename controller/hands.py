"""What the decision loop is given to work with."""

from __future__ import annotations

from dataclasses import dataclass

from controller.guard import Guard
from controller.ledger import Ledger
from controller.metrics import Metrics
from controller.policy_runner import PolicyRunner
from controller.shadows import Shadows
from controller.snapshots import Snapshots
from controller.threads import SingleThread
from controller.workers import Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long the loop waits, and how often it saves."""

    report_grace_s: float
    snapshot_every: int
    keep_steps: int | None = None
    """Of how many steps the ledger keeps reports; None: of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hands:
    """What the loop works with; it owns none of them."""

    ledger: Ledger
    ledger_thread: SingleThread
    policy: PolicyRunner
    guard: Guard
    workers: Workers
    snapshots: Snapshots
    metrics: Metrics
    shadows: Shadows
