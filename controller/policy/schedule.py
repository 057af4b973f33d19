"""The `schedule` policy: mixtures that hold from given steps on."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.config import ScheduleConfig
from controller.policy.header import HEADER, check_header, header_of
from controller.policy.mixtures import resolve
from protos.types import Step


class SchedulePolicy:
    """Piecewise constant: each point's mixture holds until the next point's step."""

    def __init__(self, config: ScheduleConfig, context: PolicyContext) -> None:
        self._config = config
        self._context = context
        self._steps = [point.step for point in config.points]
        self._mixtures = [resolve(point.mixture, context) for point in config.points]

    @property
    def name(self) -> str:
        """As in the run file."""
        return self._config.name

    @property
    def phase(self) -> str:
        """Always the same."""
        return "scheduled"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Nothing."""
        return frozenset()

    def observe(self, observation: StepObservation) -> None:
        """Learn nothing."""

    def propose(self, step: Step) -> Sequence[float]:
        """Return the mixture of the last point at or before `step`."""
        return self._mixtures[max(bisect.bisect_right(self._steps, step) - 1, 0)]

    def state(self) -> PolicyState:
        """Return only whose state it is: the mixture depends on the step alone."""
        return PolicyState(values={HEADER: header_of(self._config, self._context)})

    def restore(self, state: PolicyState) -> None:
        """Check that the state is this policy's.

        Raises:
            ValueError: it is not.
        """
        check_header(state, self._config, self._context)
