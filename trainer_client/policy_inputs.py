"""What only some policies need of a trainer: excess losses, and losses on held-out documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from protos.spec import RunSpec
from trainer_client.batches import Batch
from trainer_client.device_copy import HostCopy
from trainer_client.loss import DomainLosses


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepInputs:
    """What there is of a step, on its way to the host."""

    validation_loss: NDArray[np.float64] | None
    excess: HostCopy | None
    """[domains, 2]: sums over tokens, and how many tokens had a reference."""

    def is_here(self) -> bool:
        """Say whether `resolve` would return at once."""
        return self.excess is None or self.excess.is_here()

    def resolve(
        self, tokens: NDArray[np.int64], left_out: list[str]
    ) -> dict[str, NDArray[np.float64]]:
        """Return fields of the report; `tokens` are those that its losses are of."""
        found: dict[str, NDArray[np.float64]] = {}
        if self.validation_loss is not None:
            found["validation_loss"] = self.validation_loss
        if self.excess is None:
            return found
        sums = self.excess.wait()
        if not np.isfinite(sums).all():
            left_out.append("excess losses that are not finite")
        elif not np.array_equal(sums[:, 1], tokens):
            left_out.append("the excess losses, since not all micro-batches had a reference")
        else:
            found["excess_sum"] = sums[:, 0].copy()
        return found


class PolicyInputs:
    """Collects them over a step."""

    def __init__(self, spec: RunSpec) -> None:
        self._domains = spec.domains
        self._excess = DomainLosses(spec.num_domains)
        self._validation: NDArray[np.float64] | None = None

    def add_reference(self, losses: torch.Tensor, reference: torch.Tensor, batch: Batch) -> None:
        """Count by how much a micro-batch's losses exceed a reference's, token by token."""
        if reference.shape != losses.shape:
            raise ValueError(
                f"reference losses must have the losses' shape {tuple(losses.shape)}, got "
                f"{tuple(reference.shape)}"
            )
        excess = (losses.detach() - reference.detach()).clamp_min(0)
        self._excess.add(excess.masked_fill(~batch.loss_mask, 0), batch)

    def take_validation(self, losses: Mapping[str, float]) -> None:
        """Keep an evaluation for the step's report.

        Raises:
            ValueError: it is not of the run's domains, or a loss is no number.
        """
        if losses.keys() != set(self._domains):
            raise ValueError(
                f"record_validation() needs a loss of each of the run's domains, "
                f"{', '.join(self._domains)}; got {', '.join(losses) or 'none'}"
            )
        values = np.array([float(losses[domain]) for domain in self._domains])
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"validation losses must be finite and not negative, got {values.tolist()}"
            )
        self._validation = values

    def finish(self) -> StepInputs:
        """Return what there is of the step, and begin anew."""
        validation, self._validation = self._validation, None
        return StepInputs(validation_loss=validation, excess=self._excess.finish())

    def forget(self) -> None:
        """Drop what was collected of a step that is begun again."""
        self._excess.forget()
        self._validation = None
