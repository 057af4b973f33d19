"""How a run stands, as operators see it."""

from __future__ import annotations

from dataclasses import dataclass

from protos.types import Mixture, Quarantine

SILENT_S = 3.0
"""A worker that has missed three of its beats is shown as silent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """A loader worker as the controller sees it."""

    worker_id: str
    endpoint: str
    alive: bool
    lanes: tuple[int, ...]
    cache_bytes: int
    stall_s: float
    sequences_served: int
    leaving: bool = False
    """It is going, or has gone, because it was asked to."""

    managed: bool = False
    """It is started and ended by whoever obeys `headrace scale`."""

    silent_s: float = 0.0
    """Since the controller last heard of it; a worker says every second how it stands."""

    @property
    def is_silent(self) -> bool:
        """Whether it is hung, stopped or out of reach, but not given up yet."""
        return self.alive and self.silent_s >= SILENT_S


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowStatus:
    """A shadow policy's last turn."""

    name: str
    phase: str
    shares: tuple[float, ...]
    """[domains]: what it proposed; empty: nothing."""

    fault: str
    """Why it proposed nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What `headrace status` shows."""

    run_id: str
    policy: str
    policy_phase: str
    """As the policy calls it, e.g. `warm-up` or `acting`."""

    phase: str
    """`waiting`, `running`, `drained`"""

    domains: tuple[str, ...]
    mixture: Mixture
    plan_version: int
    observed_step: int
    sealed_through: int
    num_steps: int
    generation: int
    world_size: int
    loss: tuple[float, ...]
    """Nats a token in the newest step that had the domain; NaN: never seen."""

    tokens: int
    tokens_per_s: float
    data_wait_share: float
    degraded_steps: int
    missing_reports: int
    held_decisions: int
    decision_ms_p50: float
    """Of the newest 4,096 decisions of this controller; 0: there was none."""

    decision_ms_p99: float
    """Of the same."""

    frozen: bool
    quarantines: tuple[Quarantine, ...]
    workers: tuple[WorkerStatus, ...]
    wanted_workers: int = 0
    """How many an operator, or whoever started the run, wants; 0: nobody has said."""

    lanes_moved: int = 0
    """Lanes that went from one worker to another since the controller started."""

    data_wait_s: float = 0.0
    """How long ranks have waited for data, all ranks and steps together."""

    step_s: float = 0.0
    """How long their steps took, waits included, all ranks and steps together."""

    ledger_fault: str = ""
    """Why nothing is decided at present: the ledger cannot be written. Empty: it can."""

    shadows: tuple[ShadowStatus, ...] = ()
