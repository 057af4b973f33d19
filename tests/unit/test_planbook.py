"""Plans in order, counts at any step, and two ends that must agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.apportion import apportion, no_carry
from protos.errors import InvalidMessage
from protos.planbook import PlanBook
from protos.types import Mixture, Plan, Step

BATCH = 12


def _history(starts: list[int], seed: int) -> tuple[list[Plan], list[np.ndarray]]:
    """Plans with the given first steps, and the counts of each step worked out one by one."""
    rng = np.random.default_rng(seed)
    plans: list[Plan] = []
    counts: list[np.ndarray] = []
    carry = no_carry(4)
    for step in range(starts[-1] + 20):
        if step in starts:
            mixture = Mixture.from_shares(rng.dirichlet(np.ones(4)).tolist())
            plans.append(
                Plan(
                    version=len(plans),
                    first_step=Step(step),
                    mixture=mixture,
                    carry_q32=tuple(carry.tolist()),
                )
            )
        count, carry = apportion(plans[-1].mixture, global_sequences=BATCH, carry=carry)
        counts.append(count)
    return plans, counts


def _book(plans: list[Plan]) -> PlanBook:
    book = PlanBook(global_sequences=BATCH)
    for plan in plans:
        book.add(plan)
    return book


@settings(max_examples=50, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 30), max_size=8),
    seed=st.integers(0, 1000),
    asked=st.lists(st.integers(0, 50), max_size=20),
)
def test_counts_do_not_depend_on_what_was_asked_before(
    gaps: list[int], seed: int, asked: list[int]
) -> None:
    starts = np.cumsum([0, *gaps]).tolist()
    plans, counts = _history(starts, seed)
    book = _book(plans)
    for step in asked:
        if step < len(counts):
            assert book.counts(Step(step)).tolist() == counts[step].tolist()
            assert book.plan_at(Step(step)).version == sum(s <= step for s in starts) - 1


def test_a_plan_whose_carry_does_not_follow_is_refused() -> None:
    plans, _ = _history([0, 5], seed=1)
    book = _book(plans[:1])
    wrong = dataclasses.replace(plans[1], carry_q32=(1, -1, 0, 0))
    with pytest.raises(InvalidMessage, match="carries"):
        book.add(wrong)
    book.add(plans[1])
    book.add(plans[1])  # said twice, known once
    assert len(book.plans) == 2


def test_a_plan_for_a_step_before_the_last_plan_is_refused() -> None:
    plans, _ = _history([0, 5, 9], seed=1)
    book = _book(plans)
    with pytest.raises(InvalidMessage, match="does not come after"):
        book.add(plans[1])


def test_a_step_before_all_plans_is_refused_with_what_is_known() -> None:
    plans, _ = _history([0, 5, 9], seed=1)
    book = _book(plans)
    book.forget_before(Step(7))
    assert [plan.version for plan in book.plans] == [1, 2]
    with pytest.raises(InvalidMessage, match="the first one known: 5"):
        book.counts(Step(4))


def test_a_plan_that_comes_after_its_step_was_computed_replaces_it() -> None:
    plans, counts = _history([0, 5], seed=3)
    book = _book(plans[:1])
    book.counts(Step(12))  # the last plan goes on while nothing newer is known
    book.add(plans[1])
    assert book.counts(Step(12)).tolist() == counts[12].tolist()


def test_a_far_step_is_counted_as_if_every_step_had_been_asked_for() -> None:
    plans, _ = _history([0], seed=3)
    carry = no_carry(4)
    for _ in range(3000):
        count, carry = apportion(plans[0].mixture, global_sequences=BATCH, carry=carry)
    book = _book(plans)
    assert book.counts(Step(2999)).tolist() == count.tolist()
    assert book.carry(Step(3000)).tolist() == carry.tolist()
