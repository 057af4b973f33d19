from __future__ import annotations

import pytest

from protos.spec import ValidationSpec


def test_evaluations_are_due_within_the_span_of_each_period() -> None:
    spec = ValidationSpec(every=3, period=20, span=9)
    assert [step for step in range(45) if spec.due(step)] == [2, 5, 8, 22, 25, 28, 42]


def test_a_plain_interval_is_one_whose_span_is_its_period() -> None:
    spec = ValidationSpec(every=4, period=4, span=4)
    assert [step for step in range(12) if spec.due(step)] == [3, 7, 11]


@pytest.mark.parametrize(("every", "span", "period"), [(0, 1, 1), (3, 2, 4), (1, 5, 4)])
def test_one_that_never_comes_is_refused(every: int, span: int, period: int) -> None:
    with pytest.raises(ValueError, match="1 <= every <= span <= period"):
        ValidationSpec(every=every, span=span, period=period)
