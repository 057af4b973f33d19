"""What the policies that try mixtures out have in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from controller.policy.base import PolicyContext, Statistic
from controller.policy.online import OnlinePolicy, Part
from controller.policy.trials import Trials
from protos.types import Step


class TrialPolicy(OnlinePolicy):
    """Proposes a trial's mixture while one is due, else its newest shares."""

    def __init__(
        self,
        config: BaseModel,
        context: PolicyContext,
        shares: NDArray[np.float64],
        *,
        focus: float,
    ) -> None:
        """Begin with [domains] `shares`; a trial gives `focus` to the domain that it favours."""
        super().__init__(config, context, shares)
        self._focus = focus
        self._trials = Trials(self._num_domains)

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses, and those on held-out documents."""
        return frozenset({Statistic.LOSS, Statistic.VALIDATION})

    def _parts(self) -> Mapping[str, Part]:
        return {"trials": self._trials}

    @abc.abstractmethod
    def _favoured(self, step: int) -> int | None:
        """Return the domain that the trial of `step` favours; None: it is in no trial."""

    def propose(self, step: Step) -> Sequence[float]:
        """Return the trial's mixture, or the newest shares."""
        favoured = self._favoured(step)
        if favoured is None:
            return super().propose(step)
        return tuple(focused(self._focus, favoured, self._num_domains).tolist())


def focused(focus: float, favoured: int, num_domains: int) -> NDArray[np.float64]:
    """Return the [domains] mixture with `focus` at one domain and the rest spread evenly."""
    if num_domains == 1:
        return np.ones(1)
    shares = np.full(num_domains, (1 - focus) / (num_domains - 1))
    shares[favoured] = focus
    return shares


def missing_evaluation(name: str, step: int) -> str:
    """Say what to do about an evaluation that did not come."""
    return (
        f"policy {name} needs the losses on held-out documents after step {step}, and no rank has "
        "given them: call session.record_validation() where session.validation_due(step) says so"
    )
