"""What a policy is told of a step: the ranks' reports, added up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.types import Step


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepObservation:
    """One optimizer step, summed over the ranks. Arrays are in the order of the run's domains."""

    step: Step
    num_steps: int
    """Optimizer steps that the run is planned for."""

    planned: NDArray[np.float64]
    """[domains]: shares of the mixture in force at the step."""

    sequences: NDArray[np.int64]
    """[domains]: delivered in the step, by the ranks that reported."""

    tokens: NDArray[np.int64]
    """[domains]: labels that counted in the loss."""

    loss_sum: NDArray[np.float64]
    """[domains]: nats, summed over those tokens."""

    alignment: NDArray[np.float64] | None
    """[domains, domains]: inner products of the domains' summed gradients; None: not measured."""

    weight_norms: NDArray[np.float64]
    """[norm layers]: Euclidean norms of the watched weights; empty: not measured."""

    update_norms: NDArray[np.float64]
    """[norm layers]: Euclidean norms of the step's change of those weights."""

    num_missing_ranks: int = 0
    """Ranks whose report did not come in time."""

    validation_loss: NDArray[np.float64] | None = None
    """[domains]: nats a token on held-out documents, after the step; None: not evaluated."""

    excess_sum: NDArray[np.float64] | None = None
    """[domains]: what the tokens' losses exceed a reference model's by, in nats, where they do,
    summed over `tokens`; None: not known of all that reported."""

    part_square_norms: NDArray[np.float64] | None = None
    """[domains]: squared norms of the parts' gradients, summed over the parts that together make up
    the gradients of `alignment`; None: not measured by all that reported."""

    num_parts: NDArray[np.int64] | None = None
    """[domains]: how many parts (sequences) these are; known if their norms are."""

    @property
    def executed(self) -> NDArray[np.float64]:
        """[domains]: realised shares of the step's sequences; the planned ones if none came."""
        total = self.sequences.sum()
        return self.sequences / total if total else self.planned

    @property
    def loss(self) -> NDArray[np.float64]:
        """[domains]: mean loss in nats a token; NaN where the step had none of the domain."""
        seen = self.tokens > 0
        return np.where(seen, self.loss_sum / np.where(seen, self.tokens, 1), np.nan)
