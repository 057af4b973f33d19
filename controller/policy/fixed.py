"""Policies that learn nothing: one mixture for the whole run."""

from __future__ import annotations

from collections.abc import Sequence

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.config import NaturalConfig, StaticConfig, UniformConfig
from controller.policy.header import HEADER, check_header, header_of
from controller.policy.mixtures import resolve
from protos.types import Step

FixedConfig = StaticConfig | NaturalConfig | UniformConfig


class FixedPolicy:
    """`static`, `natural` and `uniform`."""

    def __init__(self, config: FixedConfig, context: PolicyContext) -> None:
        self._config = config
        self._context = context
        self._shares = fixed_shares(config, context)

    @property
    def name(self) -> str:
        """As in the run file."""
        return self._config.name

    @property
    def phase(self) -> str:
        """Always the same."""
        return "fixed"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Nothing."""
        return frozenset()

    def observe(self, observation: StepObservation) -> None:
        """Learn nothing."""

    def propose(self, step: Step) -> Sequence[float]:
        """Return the one mixture."""
        return self._shares

    def state(self) -> PolicyState:
        """Return only whose state it is."""
        return PolicyState(values={HEADER: header_of(self._config, self._context)})

    def restore(self, state: PolicyState) -> None:
        """Check that the state is this policy's.

        Raises:
            ValueError: it is not.
        """
        check_header(state, self._config, self._context)


def fixed_shares(config: FixedConfig, context: PolicyContext) -> tuple[float, ...]:
    """Return the mixture that `config` stands for."""
    return resolve(config.mixture if isinstance(config, StaticConfig) else config.name, context)
