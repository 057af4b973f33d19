"""What no policy may do, whatever it proposes: the bounds within which a mixture is given out.

In order of rank: a domain that has been read often enough gets nothing (`max_epochs`), then the
least and the greatest share, then the greatest change from the mixture in force. A lower rule gives
way only where it contradicts a higher one, and only as far as it must.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from controller.policy.base import PolicyContext
from controller.waterfill import Bounds, within
from protos.errors import ConfigError
from protos.types import SHARE_ONE, Mixture

SUM_TOLERANCE = 1e-6
"""How far from 1 the shares of a proposal may add up; beyond it something is wrong."""


class GuardConfig(BaseModel):
    """The `guard` part of the run file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_share: float = Field(default=0.0, ge=0, le=1)
    min_sequences: int = Field(default=0, ge=0)
    """At least so many of each domain in every step."""

    max_share: float = Field(default=1.0, gt=0, le=1)
    max_change: float = Field(default=1.0, gt=0, le=1)
    """Of any share, from one step's mixture to the next."""

    max_epochs: float | None = Field(default=None, gt=0)
    """A domain delivered so often gets nothing more, unless all have been."""

    time_budget_s: float = Field(default=2.0, gt=0)
    """How long a policy may think before the mixture in force is held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardResult:
    """The mixture to give out, and what was done to the proposal."""

    mixture: Mixture
    reasons: tuple[str, ...] = ()
    """Rules that changed the proposal; empty: none did."""

    held: bool = False
    """The proposal could not be used: `mixture` is the one in force."""


class Guard:
    """Turns proposals into mixtures that obey the run's bounds."""

    def __init__(self, config: GuardConfig, context: PolicyContext) -> None:
        """Check that some mixture obeys `config`.

        Raises:
            ConfigError: none does.
        """
        self._config = config
        self._context = context
        self._floor = max(config.min_share, config.min_sequences / context.global_sequences)
        self._check(len(context.domains))
        self._low, self._high = self._quantised(len(context.domains))
        self._last: tuple[tuple[tuple[float, ...], Mixture], GuardResult] | None = None

    @property
    def counts_epochs(self) -> bool:
        """Whether what it allows depends on how often each domain has been read."""
        return self._config.max_epochs is not None

    @staticmethod
    def hold(held: Mixture, reason: str) -> GuardResult:
        """Keep the mixture in force because of what happened to the policy."""
        return GuardResult(mixture=held, reasons=(f"hold: {reason}",), held=True)

    def apply(
        self,
        proposal: Sequence[float],
        *,
        held: Mixture,
        delivered_epochs: Sequence[float] | None = None,
    ) -> GuardResult:
        """Return the mixture closest to `proposal` that obeys the bounds.

        Args:
            proposal: what the policy wants, [domains].
            held: the mixture in force.
            delivered_epochs: how often each domain has been read so far; None: not known.
        """
        if self.counts_epochs:
            return self._apply(proposal, held, delivered_epochs)
        # Most policies propose the same for many steps.
        question = (tuple(proposal), held)
        if self._last is None or self._last[0] != question:
            self._last = question, self._apply(proposal, held, delivered_epochs)
        return self._last[1]

    def _apply(
        self,
        proposal: Sequence[float],
        held: Mixture,
        delivered_epochs: Sequence[float] | None,
    ) -> GuardResult:
        shares = np.asarray(proposal, dtype=np.float64)
        fault = self._fault(shares)
        if fault:
            return self.hold(held, fault)
        reasons: list[str] = []
        bounds = self._bounds(delivered_epochs, reasons)
        bounds = self._near(bounds, held, reasons)
        mixture = within(shares / shares.sum(), bounds)
        self._tell_moved(shares, mixture, bounds, reasons)
        return GuardResult(mixture=mixture, reasons=tuple(reasons))

    def _check(self, num_domains: int) -> None:
        config, floor = self._config, self._floor
        if floor > config.max_share:
            raise ConfigError(
                f"guard.min_share and guard.min_sequences ask for a share of {floor:g}, "
                f"more than guard.max_share {config.max_share:g}"
            )
        if num_domains * floor > 1 + 1e-12:
            raise ConfigError(
                f"guard.min_share and guard.min_sequences ask for a share of {floor:g} for each "
                f"of {num_domains} domains, more than there is; lower them"
            )
        if num_domains * config.max_share < 1 - 1e-12:
            raise ConfigError(
                f"guard.max_share {config.max_share:g} leaves a part of the batch to none of the "
                f"{num_domains} domains; raise it to {1 / num_domains:.4g} or more"
            )

    def _quantised(self, num_domains: int) -> tuple[int, int]:
        """Round the bounds inwards; outwards where inwards leaves no mixture."""
        low = math.ceil(self._floor * SHARE_ONE)
        if num_domains * low > SHARE_ONE:
            low = SHARE_ONE // num_domains
        high = math.floor(self._config.max_share * SHARE_ONE)
        if num_domains * high < SHARE_ONE:
            high = -(-SHARE_ONE // num_domains)
        return low, max(low, high)

    def _fault(self, shares: NDArray[np.float64]) -> str:
        """Say what is wrong with a proposal; empty: nothing."""
        num_domains = len(self._context.domains)
        if shares.shape != (num_domains,):
            return f"the policy proposed shares of shape {shares.shape} for {num_domains} domains"
        if not np.isfinite(shares).all():
            return f"the policy proposed shares that are not finite: {shares.tolist()}"
        if (shares < 0).any():
            return f"the policy proposed negative shares: {shares.tolist()}"
        with np.errstate(over="ignore"):  # finite shares may add up to infinity
            total = shares.sum()
        if abs(total - 1) > SUM_TOLERANCE:
            return f"the policy proposed shares that add up to {total:.9g}"
        return ""

    def _bounds(self, delivered_epochs: Sequence[float] | None, reasons: list[str]) -> Bounds:
        """Return the least and greatest share of each domain, whatever is in force."""
        num_domains = len(self._context.domains)
        low = np.full(num_domains, self._low, dtype=np.int64)
        high = np.full(num_domains, self._high, dtype=np.int64)
        limit = self._config.max_epochs
        if limit is None or delivered_epochs is None:
            return Bounds(low, high)
        spent = np.asarray(delivered_epochs, dtype=np.float64) >= limit
        if spent.all():
            reasons.append(f"max_epochs: all domains have been read {limit:g} times, none is cut")
            return Bounds(low, high)
        if not spent.any():
            return Bounds(low, high)
        low[spent] = high[spent] = 0
        reasons.append(f"max_epochs: no more of {self._named(spent)}")
        if high.sum() < SHARE_ONE:
            high[~spent] = SHARE_ONE
            reasons.append("max_share: given up, too few domains are left")
        return Bounds(low, high)

    def _near(self, bounds: Bounds, held: Mixture, reasons: list[str]) -> Bounds:
        """Narrow `bounds` to what is near the mixture in force."""
        limit = math.floor(self._config.max_change * SHARE_ONE)
        if limit >= SHARE_ONE:
            return bounds
        current = np.asarray(held.shares_q32, dtype=np.int64)
        widened = limit = max(limit, 1)
        # A bound that has just come up (a domain read to its end) can be out of reach.
        while not (near := bounds.nearest_to(current, widened)).hold_a_mixture():
            widened *= 2
        if widened > limit:
            reasons.append(f"max_change: widened to {widened / SHARE_ONE:.3g} to reach the bounds")
        return near

    def _tell_moved(
        self,
        shares: NDArray[np.float64],
        mixture: Mixture,
        bounds: Bounds,
        reasons: list[str],
    ) -> None:
        given = np.asarray(mixture.shares_q32, dtype=np.int64)
        wanted = shares * SHARE_ONE
        raised = (given == bounds.low) & (wanted < bounds.low - 1) & (given > 0)
        lowered = (given == bounds.high) & (wanted > bounds.high + 1) & (given > 0)
        at_floor = raised & (given == self._low)
        at_ceiling = lowered & (given == self._high)
        by_change = (raised | lowered) & ~at_floor & ~at_ceiling
        for chosen, done in (
            (at_floor, "min_share: raised"),
            (at_ceiling, "max_share: lowered"),
            (by_change, "max_change: held back"),
        ):
            if chosen.any():
                reasons.append(f"{done} {self._named(chosen)}")

    def _named(self, chosen: NDArray[np.bool_]) -> str:
        return ", ".join(self._context.domains[index] for index in np.flatnonzero(chosen))
