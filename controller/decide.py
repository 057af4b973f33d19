"""From what the policy advises to the mixture of a step: who has the last word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from controller.guard import Guard
from controller.history import LaneCursors, Steering
from controller.policy_runner import Advice
from protos.spec import RunSpec
from protos.types import Mixture, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The mixture of a step, and how it came about."""

    mixture: Mixture
    reasons: tuple[str, ...] = ()
    held: bool = False
    """The policy gave nothing that could be used: the mixture in force goes on."""


def choose(
    advice: Advice,
    *,
    target: Step,
    in_force: Mixture,
    sealed_through: int,
    composed_through: int,
    steering: Steering,
    guard: Guard,
    delivered_epochs: Sequence[float] | None,
) -> Choice:
    """Decide the mixture of step `target`.

    First of all comes what has happened already: a step that is final, or that workers composed
    with the last plan because they heard nothing, keeps that plan. Then comes the operator, and
    only then the policy, within the guard's bounds.
    """
    if target <= sealed_through:
        return Choice(mixture=in_force, reasons=(f"hold: step {target} is final already",))
    if target <= composed_through:
        reason = f"hold: workers composed steps through {composed_through} without a seal"
        return Choice(mixture=in_force, reasons=(reason,))
    if steering.override is not None:
        return Choice(mixture=steering.override, reasons=("override: set by the operator",))
    if steering.frozen:
        return Choice(mixture=in_force, reasons=("hold: frozen by the operator",))
    if advice.shares is None:
        result = guard.hold(in_force, advice.fault)
    else:
        result = guard.apply(advice.shares, held=in_force, delivered_epochs=delivered_epochs)
    return Choice(mixture=result.mixture, reasons=result.reasons, held=result.held)


def delivered_epochs(cursors: LaneCursors, spec: RunSpec) -> tuple[float, ...] | None:
    """Return how often each domain has been read, by the lane that is furthest; None: not known."""
    if not cursors:
        return None
    return tuple(
        float(max(int(places[domain, 0]) for _, places in cursors.values()))
        for domain in range(spec.num_domains)
    )


def json_shares(shares: Sequence[float] | None) -> list[float | str] | None:
    """Return shares as JSON values, those that are not finite as text."""
    if shares is None:
        return None
    return [share if math.isfinite(share) else str(share) for share in shares]
