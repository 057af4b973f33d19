"""Which observations a policy may learn from."""

from __future__ import annotations

import numpy as np

from controller.observation import StepObservation


def teaches(observation: StepObservation) -> bool:
    """Tell whether every number is finite and the step trained on anything at all.

    A step whose loss overflowed, or of which no report came, must change nothing.
    """
    arrays = [
        observation.planned,
        observation.loss_sum,
        observation.weight_norms,
        observation.update_norms,
    ]
    optional = (
        observation.alignment,
        observation.validation_loss,
        observation.excess_sum,
        observation.part_square_norms,
    )
    arrays += [array for array in optional if array is not None]
    return bool(observation.tokens.sum() > 0) and all(np.isfinite(a).all() for a in arrays)
