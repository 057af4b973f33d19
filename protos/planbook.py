"""The plans of a run in order, and the counts that they give each step."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from protos.apportion import Apportionment, Carry
from protos.errors import InvalidMessage
from protos.types import Mixture, Plan, Step

_STEPS_KEPT = 512
"""Steps whose counts are remembered; ranks ask for a few around the newest."""


class PlanBook:
    """Plans by first step. The last one goes on for ever; `sealed_through` says what is final.

    Not thread-safe: the owner guards it.
    """

    def __init__(self, *, global_sequences: int) -> None:
        self._global_sequences = global_sequences
        self._plans: list[Plan] = []
        self._steps: OrderedDict[Step, tuple[NDArray[np.int64], Carry, Plan]] = OrderedDict()
        self._apportioned: Apportionment | None = None
        self.sealed_through = -1

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans held, in order of `first_step`."""
        return tuple(self._plans)

    @property
    def newest(self) -> Plan:
        """The plan that goes on for ever."""
        return self._plans[-1]

    def copy(self) -> PlanBook:
        """Return a book of the same plans that can be added to on its own."""
        book = PlanBook(global_sequences=self._global_sequences)
        book._plans = self._plans.copy()
        book._steps = self._steps.copy()
        book.sealed_through = self.sealed_through
        return book

    def add(self, plan: Plan) -> None:
        """Append a plan.

        Raises:
            InvalidMessage: the plan does not come after those held, or its carry is not the one
                that they lead to (then the two ends do not compute the same counts).
        """
        if self._plans:
            last = self._plans[-1]
            if plan == last:
                return
            if plan.first_step <= last.first_step or plan.version <= last.version:
                raise InvalidMessage(
                    f"plan {plan.version} from step {plan.first_step} does not come after plan "
                    f"{last.version} from step {last.first_step}"
                )
            expected = self.carry(plan.first_step)
            if expected.tolist() != list(plan.carry_q32):
                raise InvalidMessage(
                    f"plan {plan.version} carries {list(plan.carry_q32)} into step "
                    f"{plan.first_step}, but the plans before it lead to {expected.tolist()}"
                )
            for step in [step for step in self._steps if step >= plan.first_step]:
                del self._steps[step]
        self._plans.append(plan)

    def without_after(self, version: int) -> PlanBook:
        """Return a book without the plans newer than `version`: that one goes on for ever."""
        book = self.copy()
        dropped = [plan.first_step for plan in book._plans if plan.version > version]
        book._plans = [plan for plan in book._plans if plan.version <= version]
        for step in [step for step in book._steps if step >= min(dropped, default=step + 1)]:
            del book._steps[step]
        return book

    def forget_before(self, step: Step) -> None:
        """Drop plans that no step from `step` on needs."""
        index = bisect_right(self._plans, step, key=lambda plan: plan.first_step) - 1
        del self._plans[: max(index, 0)]

    def plan_at(self, step: Step) -> Plan:
        """Return the plan in force at `step`.

        Raises:
            InvalidMessage: no plan that is held reaches so far back.
        """
        index = bisect_right(self._plans, step, key=lambda plan: plan.first_step) - 1
        if index < 0:
            first = self._plans[0].first_step if self._plans else "none"
            raise InvalidMessage(f"no plan for step {step} is known; the first one known: {first}")
        return self._plans[index]

    def next_change(self, step: Step) -> Step | None:
        """Return the first step after `step` that another plan begins with; None: not known."""
        index = bisect_right(self._plans, step, key=lambda plan: plan.first_step)
        return self._plans[index].first_step if index < len(self._plans) else None

    def counts(self, step: Step) -> NDArray[np.int64]:
        """Return the [domains] counts of a step, under the plan in force there."""
        return self._at(step)[0]

    def carry(self, step: Step) -> Carry:
        """Return the apportionment error carried into `step`."""
        if step == self._plans[0].first_step:
            return np.asarray(self._plans[0].carry_q32, dtype=np.int64)
        return self._at(Step(step - 1))[1]

    def _at(self, step: Step) -> tuple[NDArray[np.int64], Carry, Plan]:
        plan = self.plan_at(step)
        known = self._steps.get(step)
        if known is not None:
            return known
        at, carry = self._start_for(step, plan)
        while True:
            counts, carry = self._apportionment(plan.mixture).step(carry)
            self._steps[at] = (counts, carry, plan)
            if len(self._steps) > _STEPS_KEPT:
                self._steps.popitem(last=False)
            if at == step:
                return self._steps[at]
            at = Step(at + 1)

    def _apportionment(self, mixture: Mixture) -> Apportionment:
        known = self._apportioned
        if known is None or known.mixture is not mixture:
            known = Apportionment(mixture, global_sequences=self._global_sequences)
            self._apportioned = known
        return known

    def _start_for(self, step: Step, plan: Plan) -> tuple[Step, Carry]:
        """Return the latest step at or before `step` whose incoming carry is known."""
        for at in range(step - 1, plan.first_step - 1, -1):
            known = self._steps.get(Step(at))
            if known is not None:
                return Step(at + 1), known[1]
            if step - at > _STEPS_KEPT:
                break
        return plan.first_step, np.asarray(plan.carry_q32, dtype=np.int64)
