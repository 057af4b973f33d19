"""The `ado` policy: adaptive data optimisation (arXiv 2410.11820, and its published code).

For each domain a scaling law L(n) = E + A n^-alpha is fitted to its training losses as the run goes
on. A domain's share follows how fast its law falls now, its prior share and its recent share:

    rho ~ slope x prior x h^0.5,  slope = max(alpha, 0.05) (L - E) / n,  h: smoothed shares
    shares = 0.9 mean + 0.1 rho,  mean: of rho over time

Where it differs from the code, and why:

* Loss is a mean over the step's tokens; a domain that a step does not have keeps its last loss, as
  in the code, and one that none had yet gets the mean of the others.
* The smoothed losses that a law is fitted to are at most 256, evenly apart (the code: every tenth),
  and the last half window has none (the code: extrapolates), so that state and time stay bounded.
* A fit is made over several steps, a few domains in each, all taken into use at once: a decision
  never waits for a long fit, and nothing depends on how fast the machine is. See `scaling_law` for
  the fit itself.
* Where it says when to fit and what to ignore, the code has steps of a run of 60,000; the defaults
  here are the same parts of the run.
* The least share of rho is half an even share where there are so many domains that 0.01 each would
  be more; the code's floor adds up to more than 1 with over 100 domains.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import PolicyContext, Statistic
from controller.policy.loss_history import LossHistory
from controller.policy.mixtures import resolve
from controller.policy.online import OnlinePolicy, Part
from controller.policy.scaling_law import fit_laws, reducible
from controller.policy.settings_of_rivals import AdoConfig

PUBLISHED_STEPS = 60_000
PUBLISHED_WINDOW = 101
PUBLISHED_STRIDE = 10

LEAST_EXPONENT = 0.05
DOMAINS_A_STEP = 2
"""Laws that are fitted in one step: some 20 to 40 ms."""

LEAST_SAMPLES = 8
"""Before there are so many, no law is fitted."""


class AdoPolicy(OnlinePolicy):
    """The prior until the first fit, then by how fast the laws fall."""

    kept_arrays = ("losses", "laws", "pending", "credit", "mean")
    kept_values = ("next_fit", "next_domain")

    def __init__(self, config: AdoConfig, context: PolicyContext) -> None:
        prior = np.asarray(resolve(config.prior, context))
        super().__init__(config, context, prior)
        self._config = config
        self._prior = prior
        self._fit_every = config.fit_every or max(20, context.num_steps * 1000 // PUBLISHED_STEPS)
        ignore = config.ignore_steps
        if ignore is None:
            ignore = context.num_steps * 1000 // PUBLISHED_STEPS
        self._history = LossHistory(
            self._num_domains,
            window=config.smoothing_window or _window(context.num_steps),
            ignore=ignore,
            stride=max(1, min(PUBLISHED_STRIDE, context.num_steps // 1000)),
        )
        self._losses = np.full(self._num_domains, np.nan)
        self._laws = np.full((self._num_domains, 3), np.nan)
        self._pending = self._laws.copy()
        self._credit = prior.copy()
        self._mean = prior.copy()
        self._next_fit = self._fit_every
        self._next_domain = self._num_domains
        """The first domain that the fit under way has still to fit; all are: none is under way."""

    @property
    def phase(self) -> str:
        """`warm-up` until the first laws are known."""
        return "acting" if np.isfinite(self._laws).any() else "warm-up"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses."""
        return frozenset({Statistic.LOSS})

    def _parts(self) -> Mapping[str, Part]:
        return {"history": self._history}

    def _learn(self, observation: StepObservation) -> None:
        seen = observation.tokens > 0
        losses = np.where(seen, observation.loss, self._losses)
        self._losses = np.where(np.isnan(losses), observation.loss[seen].mean(), losses)
        time = float((observation.step + 1) * self._context.global_sequences)
        self._history.add(time, self._losses)
        keep = self._config.credit_smoothing
        self._credit = keep * self._credit + (1 - keep) * observation.executed
        self._fit(observation.step)
        if np.isfinite(self._laws).any():
            self._choose(observation.step, time)

    def _fit(self, step: int) -> None:
        """Go on with the fit that is under way, or begin one if it is time."""
        if self._next_domain == self._num_domains:
            if step + 1 < self._next_fit or self._history.num_samples < LEAST_SAMPLES:
                return
            self._next_domain = 0
            self._next_fit = step + 1 + self._fit_every
        part = slice(self._next_domain, self._next_domain + DOMAINS_A_STEP)
        self._pending[part] = fit_laws(self._history.times, self._history.losses[:, part])
        self._next_domain = min(self._next_domain + DOMAINS_A_STEP, self._num_domains)
        if self._next_domain == self._num_domains:
            self._laws = np.where(np.isfinite(self._pending), self._pending, self._laws)

    def _choose(self, step: int, time: float) -> None:
        wanted = self._wanted(time)
        average = self._config.average_weight
        self._shares = average * self._mean + (1 - average) * wanted
        part = 1 / (step + 2)
        self._mean = (1 - part) * self._mean + part * wanted

    def _wanted(self, time: float) -> NDArray[np.float64]:
        """Return rho, [domains] shares."""
        slopes = np.maximum(self._laws[:, 1], LEAST_EXPONENT) * reducible(self._laws, time) / time
        known = np.isfinite(slopes)
        slopes = np.where(known, slopes, slopes[known].mean() if known.any() else 0.0)
        weights = slopes * self._prior * self._credit**self._config.credit_exponent
        if not weights.sum() > 0:
            weights = self._prior
        floor = min(self._config.wanted_floor, 0.5 / self._num_domains)
        clipped = np.maximum(weights / weights.sum(), floor)
        shares: NDArray[np.float64] = clipped / clipped.sum()
        return shares


def _window(num_steps: int) -> int:
    """Return the published window, or a 20th of a short run; odd."""
    return min(PUBLISHED_WINDOW, max(5, num_steps // 20 | 1))
