"""The controller's part of a trial: policy, guard and plans, with no clock, ledger or wire."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from controller.decide import choose, delivered_epochs
from controller.history import Steering, plan_from
from controller.observation import StepObservation
from controller.policy.base import PolicyState
from controller.policy_runner import Advice
from controller.prepare import Prepared
from protos.apportion import no_carry
from protos.planbook import PlanBook
from protos.types import Cursors, Mixture, Plan, Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What came of an observation."""

    decide_s: float
    reasons: tuple[str, ...]
    """Why the guard changed the proposal; empty: it did not."""

    held: bool
    """The policy gave nothing that could be used."""

    diagnostics: Mapping[str, float]
    """What the policy tells of itself; empty: it tells nothing."""


class Pilot:
    """Decides every step's mixture as the controller does: a report of step s plans s + lag."""

    def __init__(self, prepared: Prepared) -> None:
        self._spec = prepared.spec
        self._policy = prepared.policy
        self._guard = prepared.guard
        self.book = PlanBook(global_sequences=self._spec.global_sequences)
        carry = tuple(no_carry(self._spec.num_domains).tolist())
        self.book.add(
            Plan(version=1, first_step=Step(0), mixture=prepared.initial, carry_q32=carry)
        )

    def decide(self, observation: StepObservation, cursors: Cursors) -> Decision:
        """Let the policy learn from a step, and plan the step that its report decides.

        Args:
            observation: of the step.
            cursors: the lanes' places after it.
        """
        began = time.perf_counter()
        step = observation.step
        target = Step(step + self._spec.lag)
        in_force = self.book.plans[-1].mixture
        choice = choose(
            self._advise(observation, target),
            target=target,
            in_force=in_force,
            sealed_through=target - 1,
            composed_through=-1,
            steering=Steering(),
            guard=self._guard,
            delivered_epochs=delivered_epochs(
                {lane: (Step(step + 1), places) for lane, places in cursors.items()}, self._spec
            ),
        )
        if choice.mixture != in_force:
            self.book.add(self._next_plan(choice.mixture, target))
        self.book.forget_before(Step(step + 1))
        return Decision(
            decide_s=time.perf_counter() - began,
            reasons=choice.reasons,
            held=choice.held,
            diagnostics=self._diagnostics(),
        )

    def _advise(self, observation: StepObservation, target: Step) -> Advice:
        # No time budget: a trial must not depend on how busy the machine is.
        try:
            self._policy.observe(observation)
            shares = tuple(float(share) for share in self._policy.propose(target))
        except Exception as error:
            # As in a run the mixture in force is held, and the record counts it.
            logger.exception("policy failed step=%d", observation.step)
            return Advice(shares=None, fault=f"the policy failed: {type(error).__name__}: {error}")
        return Advice(shares=shares)

    def _next_plan(self, mixture: Mixture, first_step: Step) -> Plan:
        return Plan(
            version=self.book.plans[-1].version + 1,
            first_step=first_step,
            mixture=mixture,
            carry_q32=tuple(self.book.carry(first_step).tolist()),
        )

    def _diagnostics(self) -> dict[str, float]:
        tell: Callable[[], Mapping[str, float]] | None = getattr(self._policy, "diagnostics", None)
        if tell is None:
            return {}
        return {name: float(value) for name, value in tell().items() if math.isfinite(value)}

    def state(self) -> PolicyState:
        """Return the policy's state."""
        return self._policy.state()

    def plans_from(self, step: Step) -> list[dict[str, Any]]:
        """Return the plans that steps from `step` on need, as JSON values."""
        later = (plan for plan in self.book.plans if plan.first_step > step)
        return [
            {
                "version": plan.version,
                "first_step": int(plan.first_step),
                "shares_q32": list(plan.mixture.shares_q32),
                "carry_q32": list(plan.carry_q32),
            }
            for plan in (plan_from(self.book, step), *later)
        ]

    def restore(self, state: PolicyState, plans: list[dict[str, Any]]) -> None:
        """Go on from what `state` and `plans_from` returned.

        Raises:
            ValueError: they are of another policy or other settings.
        """
        self._policy.restore(state)
        self.book = PlanBook(global_sequences=self._spec.global_sequences)
        for plan in plans:
            self.book.add(
                Plan(
                    version=plan["version"],
                    first_step=Step(plan["first_step"]),
                    mixture=Mixture(tuple(plan["shares_q32"])),
                    carry_q32=tuple(plan["carry_q32"]),
                )
            )


def entropy(shares: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return the entropy of a mixture over that of the uniform one, 0 to 1."""
    positive = shares[shares > 0]
    if len(shares) < 2:
        return 1.0
    return float(-(positive * np.log(positive)).sum() / math.log(len(shares)))
