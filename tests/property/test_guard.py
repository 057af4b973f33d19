"""Whatever is proposed, what is given out is a mixture within the bounds."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from controller.guard import Guard, GuardConfig
from protos.types import SHARE_ONE, Mixture
from tests.fakes_policy import make_context

UNIT = 2.0**-32
WEIGHT = st.one_of(st.just(0.0), st.floats(1e-300, 1e-6), st.floats(1e-6, 1.0))


@st.composite
def bounds(draw: st.DrawFn, num_domains: int) -> dict[str, float]:
    floor = draw(st.floats(0, 1)) / num_domains
    ceiling = 1 / num_domains + draw(st.floats(0, 1)) * (1 - 1 / num_domains)
    return {"min_share": floor, "max_share": max(min(ceiling, 1.0), floor)}


@st.composite
def mixtures(draw: st.DrawFn, num_domains: int) -> tuple[float, ...]:
    weights = draw(st.lists(WEIGHT, min_size=num_domains, max_size=num_domains))
    total = math.fsum(weights)
    assume(total > 1e-9)
    return tuple(weight / total for weight in weights)


@settings(deadline=None)
@given(data=st.data(), num_domains=st.integers(1, 30))
def test_shares_lie_between_floor_and_ceiling(data: st.DataObject, num_domains: int) -> None:
    limits = data.draw(bounds(num_domains))
    guard = Guard(GuardConfig.model_validate(limits), make_context(num_domains))
    result = guard.apply(data.draw(mixtures(num_domains)), held=Mixture.uniform(num_domains))
    assert not result.held
    assert min(result.mixture.shares) >= limits["min_share"] - UNIT
    assert max(result.mixture.shares) <= limits["max_share"] + UNIT


@settings(deadline=None)
@given(data=st.data(), num_domains=st.integers(1, 30))
def test_what_is_given_out_passes_unchanged(data: st.DataObject, num_domains: int) -> None:
    limits = data.draw(bounds(num_domains))
    guard = Guard(GuardConfig.model_validate(limits), make_context(num_domains))
    first = guard.apply(data.draw(mixtures(num_domains)), held=Mixture.uniform(num_domains))
    again = guard.apply(first.mixture.shares, held=first.mixture)
    assert again.mixture == first.mixture
    assert again.reasons == ()


@settings(deadline=None)
@given(data=st.data(), num_domains=st.integers(2, 30), change=st.floats(1e-6, 1))
def test_no_share_changes_by_more_than_allowed(
    data: st.DataObject, num_domains: int, change: float
) -> None:
    limits = data.draw(bounds(num_domains))
    context = make_context(num_domains)
    free = Guard(GuardConfig.model_validate(limits), context)
    held = free.apply(data.draw(mixtures(num_domains)), held=Mixture.uniform(num_domains)).mixture
    guard = Guard(GuardConfig.model_validate({**limits, "max_change": change}), context)
    given_out = guard.apply(data.draw(mixtures(num_domains)), held=held).mixture
    moved = np.abs(np.array(given_out.shares_q32) - np.array(held.shares_q32))
    assert moved.max() <= change * SHARE_ONE
    assert min(given_out.shares) >= limits["min_share"] - UNIT
    assert max(given_out.shares) <= limits["max_share"] + UNIT


@settings(deadline=None)
@given(data=st.data(), num_domains=st.integers(1, 30), sequences=st.integers(1, 20))
def test_the_floor_is_rounded_up_so_that_whole_sequences_hold(
    data: st.DataObject, num_domains: int, sequences: int
) -> None:
    global_sequences = num_domains * sequences + data.draw(st.integers(1, 50))
    guard = Guard(
        GuardConfig(min_sequences=sequences),
        make_context(num_domains, global_sequences=global_sequences),
    )
    result = guard.apply(data.draw(mixtures(num_domains)), held=Mixture.uniform(num_domains))
    assert min(result.mixture.shares_q32) * global_sequences >= sequences * SHARE_ONE


@settings(deadline=None)
@given(data=st.data(), num_domains=st.integers(2, 30))
def test_domains_read_to_their_end_get_nothing_unless_all_are(
    data: st.DataObject, num_domains: int
) -> None:
    limits = {**data.draw(bounds(num_domains)), "max_epochs": 2.0, "max_change": 0.25}
    guard = Guard(GuardConfig.model_validate(limits), make_context(num_domains))
    epochs = data.draw(st.lists(st.floats(0, 4), min_size=num_domains, max_size=num_domains))
    result = guard.apply(
        data.draw(mixtures(num_domains)),
        held=Mixture.from_shares(data.draw(mixtures(num_domains))),
        delivered_epochs=epochs,
    )
    spent = np.array(epochs) >= 2
    if not spent.all():
        assert np.array(result.mixture.shares_q32)[spent].sum() == 0


@settings(deadline=None)
@given(data=st.data(), num_domains=st.integers(2, 30))
def test_shares_at_no_bound_keep_their_proportions(data: st.DataObject, num_domains: int) -> None:
    limits = data.draw(bounds(num_domains))
    wanted = np.array(data.draw(mixtures(num_domains)))
    guard = Guard(GuardConfig.model_validate(limits), make_context(num_domains))
    result = guard.apply(wanted.tolist(), held=Mixture.uniform(num_domains))
    shares = np.array(result.mixture.shares)
    free = (
        (shares > limits["min_share"] + 1e-6)
        & (shares < limits["max_share"] - 1e-6)
        & (wanted > 1e-4)
    )
    if free.sum() > 1:
        factors = shares[free] / wanted[free]
        assert np.allclose(factors, factors[0], rtol=1e-4)


@settings(deadline=None)
@given(
    proposal=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=6),
    num_domains=st.integers(1, 5),
)
@example(proposal=[0.0, 1.7e308, 1.7e308], num_domains=3)
def test_no_proposal_breaks_the_guard(proposal: list[float], num_domains: int) -> None:
    guard = Guard(GuardConfig(min_share=0.01, max_change=0.2), make_context(num_domains))
    held = Mixture.uniform(num_domains)
    result = guard.apply(proposal, held=held)
    assert sum(result.mixture.shares_q32) == SHARE_ONE
    if result.held:
        assert result.mixture == held
