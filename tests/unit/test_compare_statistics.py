"""Curves, crossings and intervals, against hand-worked numbers and printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.compare.statistics import (
    correlation,
    estimate,
    first_crossing,
    smoothed,
    t_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "printed"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.975, 9, 2.26216),
        (0.975, 30, 2.04227),
        (0.95, 2, 2.91999),
        (0.995, 2, 9.92484),
        (0.90, 5, 1.47588),
    ],
)
def test_quantiles_are_those_of_the_printed_tables(
    probability: float, degrees: int, printed: float
) -> None:
    assert t_quantile(probability, degrees=degrees) == pytest.approx(printed, abs=6e-6 * printed)


@given(st.floats(0.001, 0.999))
def test_with_one_and_two_degrees_they_have_closed_forms(probability: float) -> None:
    # Cauchy's distribution, and x / sqrt(2 + x^2).
    assert t_quantile(probability, degrees=1) == pytest.approx(
        math.tan(math.pi * (probability - 0.5)), rel=1e-8, abs=1e-9
    )
    centred = 2 * probability - 1
    two = centred * math.sqrt(2 / (1 - centred**2))
    assert t_quantile(probability, degrees=2) == pytest.approx(two, rel=1e-8, abs=1e-9)


def test_an_interval_worked_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0], confidence=0.95)
    # sd 1, so half the width is 4.302653 / sqrt(3).
    assert (found.mean, found.sd, found.num) == (2.0, 1.0, 3)
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.high == pytest.approx(2 + 2.484138, abs=1e-6)
    assert not found.excludes_zero
    assert estimate([1.0, 1.1, 1.2], confidence=0.95).excludes_zero
    assert estimate([-1.0, -1.1, -1.2], confidence=0.95).excludes_zero


def test_a_single_value_has_no_interval_and_excludes_nothing() -> None:
    found = estimate([5.0], confidence=0.95)
    assert found.low is None
    assert found.sd is None
    assert not found.excludes_zero


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    intervals = [estimate(draw, confidence=0.9) for draw in generator.normal(0, 1, (4000, 3))]
    misses = np.mean([found.excludes_zero for found in intervals])
    # 4,000 draws of a chance of 0.1 have a standard deviation of 0.0047.
    assert misses == pytest.approx(0.1, abs=0.02)


def test_smoothing_is_a_trailing_mean_of_as_many_as_there_are() -> None:
    np.testing.assert_allclose(smoothed([9.0, 7.0, 5.0, 1.0], 3), [9, 8, 7, 13 / 3])
    table = np.array([[1.0, 10.0], [3.0, 30.0]])
    np.testing.assert_allclose(smoothed(table, 2), [[1, 10], [2, 20]])


def test_a_crossing_lies_on_the_line_between_two_points() -> None:
    steps, losses = [0, 10, 20, 30], [8.0, 6.0, 5.0, 5.5]
    assert first_crossing(steps, losses, 5.25) == pytest.approx(17.5)
    assert first_crossing(steps, losses, 6.0) == pytest.approx(10)
    assert first_crossing(steps, losses, 9.0) == 0
    assert first_crossing(steps, losses, 4.9) is None


@given(st.lists(st.floats(1, 9), min_size=2, max_size=20), st.floats(1, 9))
def test_a_curve_reaches_its_own_values_and_not_before(losses: list[float], target: float) -> None:
    steps = list(range(len(losses)))
    found = first_crossing(steps, losses, target)
    if min(losses) > target:
        assert found is None
    else:
        first = next(index for index, loss in enumerate(losses) if loss <= target)
        assert found is not None
        assert first - 1 <= found <= first


def test_correlation_needs_three_pairs_that_vary() -> None:
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert correlation([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]) == pytest.approx(-0.5)
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
