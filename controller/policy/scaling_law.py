"""Scaling laws of losses, L(n) = exp(e) + exp(a) n^-alpha, fitted to many domains at once.

The objective is the sum of Huber losses of log L, as ADO has it. It is followed downhill from the
best of its 512 starting points for each of the 8 exponents (the published code descends from all of
them) by Gauss-Newton steps with the Huber weights, damped until they descend. What the published
code penalises beyond (alpha, a, e), whose slope outweighs the data's, is a bound here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DELTA = 1e-3
"""Where the Huber loss of a difference of logarithms turns from a square to a line."""

LEVELS = np.arange(-2.0, 6.0)
FLOORS = np.arange(-2.0, 2.0, 0.5)
EXPONENTS = np.arange(0.0, 0.8, 0.1)
"""Starting points: all triples of these a, e and alpha."""

MAX_LEVEL = 6.5
MAX_EXPONENT = 0.8
MIN_FLOOR = 0.5
"""Bounds of a, alpha and e; e may be less where the losses themselves are near it."""

NUM_ROUNDS = 60
_SCREENED = 64
"""Samples by which starting points are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    """Fits that are made side by side: [fits, samples] and [fits, 3]."""

    log_time: Floats
    log_loss: Floats
    low: Floats
    high: Floats


def fit_laws(times: Floats, losses: Floats) -> Floats:
    """Return [domains, 3]: a, alpha and e of each domain; NaN where no law was found.

    Args:
        times: [samples], above 0.
        losses: [samples, domains] in nats, above 0.
    """
    num_domains = losses.shape[1]
    log_time, log_loss = np.log(times), np.log(np.maximum(losses, 1e-12)).T
    low, high = _bounds(log_loss)
    starts = _starts(log_time, log_loss, low, high)
    num_starts = starts.shape[1]
    problem = _Problem(
        log_time=log_time,
        log_loss=np.repeat(log_loss, num_starts, axis=0),
        low=np.repeat(low, num_starts, axis=0),
        high=np.repeat(high, num_starts, axis=0),
    )
    found, costs = _descend(problem, starts.reshape(-1, 3))
    best = costs.reshape(num_domains, num_starts).argmin(axis=1)
    laws: Floats = found.reshape(num_domains, num_starts, 3)[np.arange(num_domains), best]
    finite = np.isfinite(laws).all(axis=1) & np.isfinite(costs.reshape(num_domains, -1).min(axis=1))
    return np.where(finite[:, None], laws, np.nan)


def reducible(laws: Floats, time: float) -> Floats:
    """Return [domains]: how far above its floor each law is at `time`, in nats."""
    gap: Floats = np.exp(laws[:, 0] - laws[:, 1] * np.log(time))
    return gap


def _bounds(log_loss: Floats) -> tuple[Floats, Floats]:
    # A floor above the losses fits nothing, whatever the published bound says.
    floor = np.minimum(MIN_FLOOR, log_loss.min(axis=1) - 0.5)
    num_domains = len(log_loss)
    low = np.stack([np.full(num_domains, -20.0), np.zeros(num_domains), floor], axis=1)
    high = np.tile([MAX_LEVEL, MAX_EXPONENT, 20.0], (num_domains, 1))
    return low, high


def _starts(log_time: Floats, log_loss: Floats, low: Floats, high: Floats) -> Floats:
    """Return [domains, exponents, 3]: the best starting point with each exponent."""
    step = -(-len(log_time) // _SCREENED)
    times, wanted = log_time[::step], log_loss[:, ::step]
    grid = np.array(list(itertools.product(EXPONENTS, LEVELS, FLOORS)))[:, [1, 0, 2]]
    chosen = np.empty((len(log_loss), len(EXPONENTS), 3))
    for domain, losses in enumerate(wanted):
        points = np.clip(grid, low[domain], high[domain])
        cost = _huber(_residual(points, times, losses)).sum(axis=1)
        best = cost.reshape(len(EXPONENTS), -1).argmin(axis=1)
        chosen[domain] = points.reshape(len(EXPONENTS), -1, 3)[np.arange(len(EXPONENTS)), best]
    return chosen


def _residual(laws: Floats, log_time: Floats, log_loss: Floats) -> Floats:
    power = laws[:, :1] - laws[:, 1:2] * log_time
    residual: Floats = np.logaddexp(power, laws[:, 2:]) - log_loss
    return residual


def _huber(residual: Floats) -> Floats:
    size = np.abs(residual)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))


def _descend(problem: _Problem, laws: Floats) -> tuple[Floats, Floats]:
    """Return the [fits, 3] laws that are found from `laws`, and the [fits] objectives."""
    residual = _residual(laws, problem.log_time, problem.log_loss)
    cost = _huber(residual).sum(axis=1)
    damping = np.full(len(laws), 1e-2)
    for _ in range(NUM_ROUNDS):
        tried = np.clip(laws + _step(problem, laws, residual, damping), problem.low, problem.high)
        new_residual = _residual(tried, problem.log_time, problem.log_loss)
        new_cost = _huber(new_residual).sum(axis=1)
        better = new_cost < cost
        laws = np.where(better[:, None], tried, laws)
        residual = np.where(better[:, None], new_residual, residual)
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 6), 1e-9, 1e9)
    return laws, cost


def _step(problem: _Problem, laws: Floats, residual: Floats, damping: Floats) -> Floats:
    """Return [fits, 3]: where a damped Gauss-Newton step leads."""
    # The share that falls with time has in the law.
    power = laws[:, :1] - laws[:, 1:2] * problem.log_time
    part = 1 / (1 + np.exp(np.clip(laws[:, 2:] - power, -500, 500)))
    slopes = np.stack([part, -part * problem.log_time, 1 - part], axis=2)
    weight = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))
    gradient = np.einsum("fs,fsp->fp", weight * residual, slopes)
    matrix = np.einsum("fsp,fsq->fpq", weight[:, :, None] * slopes, slopes)
    diagonal = np.einsum("fpp->fp", matrix)
    # A bound that the step would cross is not left.
    stuck = ((laws <= problem.low) & (gradient > 0)) | ((laws >= problem.high) & (gradient < 0))
    free = ~stuck
    matrix = matrix * (free[:, :, None] & free[:, None, :])
    ridge = np.where(free, damping[:, None] * diagonal + 1e-12, 1.0)
    matrix = matrix + np.eye(3) * ridge[:, :, None]
    step: Floats = np.linalg.solve(matrix, -(gradient * free)[:, :, None])[:, :, 0]
    return step
