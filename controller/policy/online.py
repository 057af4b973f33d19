"""What the policies that learn from observations have in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.finite import teaches
from controller.policy.header import HEADER, check_header, header_of
from protos.types import Step

FINAL = "final"
"""Where a state has, by domain, the shares that its run was made to find."""


class Part(Protocol):
    """A part of a policy that has a state of its own."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""


class OnlinePolicy(abc.ABC):
    """Proposes its newest shares; learns nothing of a step that teaches nothing.

    Everything that changes is in the attributes that `kept_arrays` and `kept_values` name and in
    the parts, so that the state is whole if these are.
    """

    kept_arrays: ClassVar[tuple[str, ...]] = ()
    kept_values: ClassVar[tuple[str, ...]] = ()
    """Names of JSON values; an array belongs into `kept_arrays`."""

    def __init__(
        self, config: BaseModel, context: PolicyContext, shares: NDArray[np.float64]
    ) -> None:
        """Begin with [domains] `shares`."""
        self._context = context
        self._num_domains = len(context.domains)
        self._settings = config
        self._shares = shares

    @property
    def name(self) -> str:
        """As in the run file."""
        return str(getattr(self._settings, "name"))  # noqa: B009  each policy's model has one

    @property
    @abc.abstractmethod
    def phase(self) -> str:
        """What the policy is doing, in a word or two."""

    @property
    @abc.abstractmethod
    def needs(self) -> frozenset[Statistic]:
        """What the trainers must measure."""

    def observe(self, observation: StepObservation) -> None:
        """Learn from a step. An observation with a number that is not finite changes nothing."""
        if teaches(observation):
            self._learn(observation)

    @abc.abstractmethod
    def _learn(self, observation: StepObservation) -> None:
        """Take in a step whose numbers are finite, and put the new shares into `_shares`."""

    def _parts(self) -> Mapping[str, Part]:
        """Return the parts that have a state of their own."""
        return {}

    def _final(self) -> NDArray[np.float64] | None:
        """Return the [domains] mixture that a proxy run comes to; None: there is none."""
        return None

    def propose(self, step: Step) -> Sequence[float]:
        """Return the newest shares."""
        return tuple(self._shares.tolist())

    def state(self) -> PolicyState:
        """Return the shares and all that they come from."""
        arrays: dict[str, NDArray[Any]] = {"shares": self._shares.copy()}
        arrays |= {name: getattr(self, f"_{name}").copy() for name in self.kept_arrays}
        for part, held in self._parts().items():
            arrays |= {f"{part}.{name}": array for name, array in held.arrays().items()}
        values = {name: getattr(self, f"_{name}") for name in self.kept_values}
        if (final := self._final()) is not None:
            values[FINAL] = dict(zip(self._context.domains, final.tolist(), strict=True))
        return PolicyState(
            arrays=arrays,
            values={HEADER: header_of(self._settings, self._context), **values},
        )

    def restore(self, state: PolicyState) -> None:
        """Go on from a state that `state` returned.

        Raises:
            ValueError: the state is of another policy, other domains or other settings.
        """
        check_header(state, self._settings, self._context)
        for name in ("shares", *self.kept_arrays):
            setattr(self, f"_{name}", np.array(state.arrays[name]))
        for name in self.kept_values:
            setattr(self, f"_{name}", state.values[name])
        for part, held in self._parts().items():
            prefix = f"{part}."
            held.restore(
                {
                    name.removeprefix(prefix): array
                    for name, array in state.arrays.items()
                    if name.startswith(prefix)
                }
            )
