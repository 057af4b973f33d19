"""Trial mixtures one after the other, and what each does to the losses on held-out documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.spec import ValidationSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Timetable:
    """A round: a phase under the mixture in force, then trial phases, then the rest.

    The model is evaluated after each phase, so that the first evaluation is what the first trial is
    measured from.
    """

    phase_steps: int
    num_trials: int
    round_steps: int

    @property
    def trial_steps(self) -> int:
        """Steps from the beginning of a round to the end of its last trial."""
        return (self.num_trials + 1) * self.phase_steps

    @property
    def validation(self) -> ValidationSpec:
        """When an evaluation is due."""
        return ValidationSpec(
            every=self.phase_steps, period=self.round_steps, span=self.trial_steps
        )

    def round(self, step: int) -> int:
        """Return the number of the round that `step` is in."""
        return step // self.round_steps

    def trial(self, step: int) -> int | None:
        """Return the number of the trial that `step` is in; None: in none."""
        place = step % self.round_steps // self.phase_steps - 1
        return place if 0 <= place < self.num_trials else None

    def num_ended(self, step: int) -> int:
        """Return how many trials of its round have ended when `step` has."""
        return (step % self.round_steps + 1) // self.phase_steps - 1


class Trials:
    """What a round's trials came to. Each trial favours one domain; a domain can have several."""

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._begin(np.full(num_domains, np.nan))
        self._complete = False

    def _begin(self, losses: NDArray[np.float64]) -> None:
        self._losses = losses
        self._drops = np.zeros((self._num_domains, self._num_domains))
        self._executed = np.zeros((self._num_domains, self._num_domains))
        self._num_steps = np.zeros(self._num_domains, np.int64)
        self._complete = True

    @property
    def is_complete(self) -> bool:
        """Whether every evaluation of the round so far has come."""
        return self._complete

    @property
    def drops(self) -> NDArray[np.float64]:
        """[domains, favoured domains]: how far each loss fell in the trials of each domain."""
        return self._drops

    @property
    def executed(self) -> NDArray[np.float64]:
        """[favoured domains, domains]: mean shares carried out in its trials."""
        shares: NDArray[np.float64] = self._executed / np.maximum(self._num_steps, 1)[:, None]
        return shares

    def trained(self, favoured: int, executed: NDArray[np.float64]) -> None:
        """Take in what a step of a trial was made of."""
        self._executed[favoured] += executed
        self._num_steps[favoured] += 1

    def begin(self, losses: NDArray[np.float64]) -> None:
        """Begin a round with the [domains] losses that its first trial is measured from."""
        self._begin(np.array(losses))

    def ended(self, favoured: int, losses: NDArray[np.float64], *, relative: bool) -> None:
        """Take in the [domains] losses at the end of a trial."""
        drop = self._losses - losses
        if relative:
            drop = np.divide(drop, self._losses, out=np.zeros_like(drop), where=self._losses > 0)
        self._drops[:, favoured] += drop
        self._losses = np.array(losses)

    def missed(self) -> None:
        """Give the round up: an evaluation has not come."""
        self._complete = False

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        return {
            "losses": self._losses.copy(),
            "drops": self._drops.copy(),
            "executed": self._executed.copy(),
            "num_steps": self._num_steps.copy(),
            "complete": np.array(self._complete),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        self._losses = np.array(arrays["losses"])
        self._drops = np.array(arrays["drops"])
        self._executed = np.array(arrays["executed"])
        self._num_steps = np.array(arrays["num_steps"])
        self._complete = bool(arrays["complete"])
