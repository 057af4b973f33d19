"""How the domains' gradients lie to one another, as the page shows it."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation

KEEP = 0.9
"""Weight of what was known before a new step's measure, which is noisy."""

UNKNOWN = -128
MAX_CELLS = 256
"""Rows of a heat map that is sent; of more domains the first ones."""

Floats = NDArray[np.float64]


def rewards_of(observation: StepObservation) -> Floats:
    """Return how much each domain helps the others in this step: [domains], NaN where not measured.

    The inner product of a domain's mean gradient with the sum of the others', in units of the mean
    gradient's length; as AC-ODM scores domains, before anything is smoothed.
    """
    alignment, num_domains = observation.alignment, len(observation.planned)
    seen = observation.tokens > 0
    if alignment is None or not seen.any():
        return np.full(num_domains, np.nan)
    tokens = np.maximum(observation.tokens, 1).astype(np.float64)
    gram = np.where(np.outer(seen, seen), alignment / tokens[:, None] / tokens, 0.0)
    squares = np.diag(gram)
    length = np.sqrt(np.maximum(squares[seen], 0)).mean()
    if not length > 0:
        return np.full(num_domains, np.nan)
    scores: Floats = (gram.sum(axis=1) - squares) / length
    return np.where(seen, scores, np.nan)


class HeatMap:
    """Cosines between the domains' gradients, smoothed over the steps that measured them."""

    def __init__(self, num_domains: int) -> None:
        self.step = -1
        """The newest step that is in it."""

        self._cosines: Floats = np.full((num_domains, num_domains), np.nan)

    def add(self, observation: StepObservation) -> None:
        """Take a step in, if it measured the gradients."""
        gram = observation.alignment
        if gram is None:
            return
        norms = np.sqrt(np.maximum(np.diag(gram), 0))
        lengths = norms[:, None] * norms
        cosines = np.divide(gram, lengths, out=np.full_like(gram, np.nan), where=lengths > 0)
        known, old = np.isfinite(cosines), np.isfinite(self._cosines)
        blended = np.where(old, KEEP * self._cosines + (1 - KEEP) * cosines, cosines)
        self._cosines = np.where(known, blended, self._cosines)
        self.step = int(observation.step)

    def packed(self) -> dict[str, int | str]:
        """Return its size and its cells row by row: base64 of bytes, 127 for a cosine of 1."""
        cells = np.clip(self._cosines[:MAX_CELLS, :MAX_CELLS], -1, 1) * 127
        whole = np.where(np.isfinite(cells), np.rint(cells), UNKNOWN).astype(np.int8)
        data = base64.b64encode(whole.tobytes()).decode("ascii")
        return {"step": self.step, "size": len(whole), "cells": data}
