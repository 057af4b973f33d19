"""The environments that policies are tried in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.learning.environments import Environment, Problem, Vector

STEPS = 300
SIZE = 16


def _axis(index: int) -> Vector:
    axis: Vector = np.eye(SIZE)[index]
    return axis


def _outer(axes: list[int], heights: list[float]) -> NDArray[np.float64]:
    bent = np.zeros((SIZE, SIZE))
    for axis, height in zip(axes, heights, strict=True):
        bent[axis, axis] = height
    return bent


def _linear(slopes: Vector, *, noise: float = 1.0) -> Problem:
    k = len(slopes)
    return Problem(
        curvatures=np.zeros((k, SIZE, SIZE)),
        centres=np.zeros((k, SIZE)),
        slopes=slopes,
        bases=np.full(k, 6.0),
        noise=np.full(k, noise),
    )


def _pulls(strengths: list[float], *, private: float = 0.3) -> Vector:
    """Slopes along a common direction, by strength, and each along one of its own."""
    return np.stack(
        [strength * _axis(0) + private * _axis(1 + k) for k, strength in enumerate(strengths)]
    )


def bandit() -> Environment:
    """Constant gradients: domain 0 helps most, domain 5 harms; the best mixture is a corner."""
    problem = _linear(_pulls([1.0, 0.7, 0.4, 0.2, 0.0, -0.3]))
    return Environment(name="bandit", problems=((0, problem),), num_steps=STEPS, rate=0.02)


def drifting() -> Environment:
    """The same, until another domain is the one that helps."""
    first = _linear(_pulls([1.0, 0.1, 0.3, 0.2, 0.0, -0.3]))
    second = _linear(_pulls([-0.2, 1.0, 0.3, 0.2, 0.0, 0.1]))
    return Environment(
        name="drifting", problems=((0, first), (STEPS, second)), num_steps=2 * STEPS, rate=0.02
    )


def aligned() -> Environment:
    """Quadratic losses: 0 and 1 teach fastest what most share, 4 and 5 want the opposite.

    All begin at 6 nats, so that losses alone say nothing.
    """
    heights = [4.0, 2.0, 0.5, 0.3, 1.0, 1.0]
    centres = np.zeros((6, SIZE))
    centres[:, 0] = [2.0, 2.0, 2.0, 2.0, -1.0, -1.0]
    for k in range(6):
        centres[k, 1 + k] = 0.6
    curvatures = np.stack([_outer([0, 1 + k], [heights[k], 0.3]) for k in range(6)])
    problem = Problem(
        curvatures=curvatures,
        centres=centres,
        slopes=np.zeros((6, SIZE)),
        bases=6.0 - np.einsum("ki,kij,kj->k", centres, curvatures, centres) / 2,
        noise=np.full(6, 1.0),
    )
    return Environment(name="aligned", problems=((0, problem),), num_steps=STEPS, rate=0.001)


def helper() -> Environment:
    """Domain 0 has the least loss and helps the others more than itself."""
    curvatures = np.stack([_outer([0], [2.0])] + [_outer([0, k], [1.0, 1.0]) for k in range(1, 6)])
    centres = np.zeros((6, SIZE))
    centres[:, 0] = 2.0
    for k in range(1, 6):
        centres[k, k] = 0.5 if k % 2 else -0.5
    problem = Problem(
        curvatures=curvatures,
        centres=centres,
        slopes=np.zeros((6, SIZE)),
        bases=np.array([-3.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
        noise=np.full(6, 1.0),
    )
    return Environment(name="helper", problems=((0, problem),), num_steps=STEPS, rate=0.001)


def neutral() -> Environment:
    """All domains alike: no mixture is better than another."""
    problem = Problem(
        curvatures=np.stack([_outer([0, 1], [1.0, 0.5])] * 6),
        centres=np.stack([_axis(0) + _axis(1)] * 6),
        slopes=np.zeros((6, SIZE)),
        bases=np.full(6, 3.0),
        noise=np.full(6, 0.5),
    )
    return Environment(name="neutral", problems=((0, problem),), num_steps=STEPS, rate=0.01)


def strangers() -> Environment:
    """Domains that have nothing in common: each learns from itself alone, some faster."""
    heights = [4.0, 2.0, 1.0, 0.5, 0.2, 0.05]
    problem = Problem(
        curvatures=np.stack([_outer([k], [height]) for k, height in enumerate(heights)]),
        centres=np.stack([_axis(k) for k in range(6)]),
        slopes=np.zeros((6, SIZE)),
        bases=np.full(6, 3.0),
        noise=np.array([0.5, 0.5, 0.5, 0.5, 2.0, 2.0]),
    )
    return Environment(name="strangers", problems=((0, problem),), num_steps=STEPS, rate=0.01)


INTERACTING = (bandit, drifting, aligned, helper)
"""Where a domain's gradients say what it does for others."""

EVERYWHERE = (*INTERACTING, neutral, strangers)
