"""The `pike` policy: shares by the size and noise of the domains' gradients (2502.06244).

Every `update_steps` steps

    w_k <- w_k exp(zeta1 |grad L_k|^2 - zeta2 / (2 b) sigma_k^2), normalised

with b the sequences of a step and sigma_k^2 the variance of the gradient of one sequence. Both come
from the sum S and the squared norms q of the m sequences' gradients of a step (per token of it):

    v = (q - |S|^2 / m) / (m - 1);  |grad|^2 = |S|^2 / m^2 - v / m;  sigma^2 = v

Where it differs from the published text, and why:

* zeta1, zeta2 and the interval are in an appendix that was not at hand; the defaults are ours. So
  that they mean the same for every model and choice of watched layers, both moments are divided by
  the domains' mean |grad|^2.
* Moments are means over the steps of the interval in which a domain had two sequences or more,
  rather than of one step: one step's are very noisy. A mean below 0 counts as 0. A domain that had
  none of these steps keeps its share against the others' mean.
* The exponent is cut off at 1 either way, and no domain gets less than `floor`: one that gets
  nothing would never be measured again.
* Gradients are those of the watched layers, sketched. The balanced form is left out: it weighs
  losses, which is the trainer's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, Statistic
from controller.policy.mixtures import check_floor, floored, resolve
from controller.policy.online import OnlinePolicy
from controller.policy.settings_of_rivals import PikeConfig

MAX_EXPONENT = 1.0


class PikePolicy(OnlinePolicy):
    """Favours domains whose gradients are large beside their noise."""

    kept_arrays = ("weights", "squares", "noise", "num_measured")
    kept_values = ("num_observed",)

    def __init__(self, config: PikeConfig, context: PolicyContext) -> None:
        """Begin with the initial mixture.

        Raises:
            ConfigError: the floor is too high for the number of domains.
        """
        check_floor(config.floor, len(context.domains))
        weights = np.asarray(resolve(config.initial, context))
        super().__init__(config, context, floored(weights, config.floor))
        self._config = config
        self._weights = self._shares.copy()
        self._num_observed = 0
        self._forget()

    @property
    def phase(self) -> str:
        """Always the same."""
        return "acting"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses, and the gradients' squared norms with their noise."""
        return frozenset({Statistic.LOSS, Statistic.ALIGNMENT, Statistic.GRADIENT_NOISE})

    def _forget(self) -> None:
        self._squares = np.zeros(self._num_domains)
        self._noise = np.zeros(self._num_domains)
        self._num_measured = np.zeros(self._num_domains, np.int64)

    def _learn(self, observation: StepObservation) -> None:
        square, variance, known = moments(observation)
        self._squares = self._squares + np.where(known, square, 0)
        self._noise = self._noise + np.where(known, variance, 0)
        self._num_measured = self._num_measured + known
        self._num_observed += 1
        if self._num_observed % self._config.update_steps == 0:
            self._update()
            self._forget()

    def _update(self) -> None:
        known = self._num_measured > 0
        counts = np.maximum(self._num_measured, 1)
        # Only the mean is cut off at 0: to cut off each step's would favour noisy domains.
        squares, noise = np.maximum(self._squares / counts, 0), self._noise / counts
        scale = squares[known].mean() if known.any() else 0.0
        if not scale > 0:
            return
        b = self._context.global_sequences
        gain = self._config.zeta1 * squares / scale
        loss = self._config.zeta2 / (2 * b) * noise / scale
        exponent = np.clip(gain - loss, -MAX_EXPONENT, MAX_EXPONENT)
        exponent = np.where(known, exponent, exponent[known].mean())
        weights = self._weights * np.exp(exponent)
        self._weights = floored(weights / weights.sum(), self._config.floor)
        self._shares = self._weights


def moments(
    observation: StepObservation,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return, [domains] each: |grad|^2, the variance of one sequence's gradient, and which hold.

    Both are unbiased, so the first can be below 0. Gradients are those of the mean loss of a token.
    """
    num_domains = len(observation.tokens)
    parts, norms = observation.num_parts, observation.part_square_norms
    if observation.alignment is None or parts is None or norms is None:
        return np.zeros(num_domains), np.zeros(num_domains), np.zeros(num_domains, np.bool_)
    known = (parts > 1) & (observation.tokens > 0)
    count = np.where(known, parts, 2)
    per_token = (count / np.maximum(observation.tokens, 1)) ** 2
    whole = np.diag(observation.alignment)
    variance = np.maximum(norms - whole / count, 0) / (count - 1)
    square = whole / count**2 - variance / count
    return square * per_token, variance * per_token, known
