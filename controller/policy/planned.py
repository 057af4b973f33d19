"""Policies that learn nothing: mixtures that are known before the first step."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.config import NaturalConfig, ScheduleConfig, StaticConfig, UniformConfig
from controller.policy.header import HEADER, check_header, header_of
from controller.policy.mixtures import resolve
from protos.types import Step

PlannedConfig = StaticConfig | NaturalConfig | UniformConfig | ScheduleConfig


class PlannedPolicy:
    """`static`, `natural`, `uniform` and `schedule`: piecewise constant, most of them one piece."""

    def __init__(self, config: PlannedConfig, context: PolicyContext) -> None:
        self._config = config
        self._context = context
        self._steps, self._mixtures = _pieces(config, context)

    @property
    def name(self) -> str:
        """As in the run file."""
        return self._config.name

    @property
    def phase(self) -> str:
        """Always the same."""
        return "scheduled" if isinstance(self._config, ScheduleConfig) else "fixed"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Nothing."""
        return frozenset()

    def observe(self, observation: StepObservation) -> None:
        """Learn nothing."""

    def propose(self, step: Step) -> Sequence[float]:
        """Return the mixture of the last piece that begins at or before `step`."""
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


def first_shares(config: PlannedConfig, context: PolicyContext) -> tuple[float, ...]:
    """Return the mixture that the run begins with."""
    return _pieces(config, context)[1][0]


def _pieces(
    config: PlannedConfig, context: PolicyContext
) -> tuple[list[int], list[tuple[float, ...]]]:
    """Return first steps, and the mixture from each on."""
    match config:
        case ScheduleConfig():
            steps = [point.step for point in config.points]
            return steps, [resolve(point.mixture, context) for point in config.points]
        case StaticConfig():
            return [0], [resolve(config.mixture, context)]
        case _:
            return [0], [resolve(config.name, context)]
