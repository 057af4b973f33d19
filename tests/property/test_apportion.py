"""The laws of apportionment: exact in every step, close over any run of steps."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.apportion import apportion, no_carry
from protos.types import SHARE_ONE, Mixture

shares = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda raw: sum(raw) > 0)
batches = st.integers(1, 4096)


@given(shares)
def test_quantised_shares_add_up_exactly_and_keep_zeros(raw: list[float]) -> None:
    mixture = Mixture.from_shares(raw)
    assert sum(mixture.shares_q32) == SHARE_ONE
    for given_share, share in zip(raw, mixture.shares_q32, strict=True):
        assert abs(share - given_share / math.fsum(raw) * SHARE_ONE) < 1.5
        assert given_share > 0 or share == 0


@given(mixtures=st.lists(shares, min_size=1, max_size=6), batch=batches)
def test_every_step_gives_floor_or_ceiling_and_zero_to_zero(
    mixtures: list[list[float]], batch: int
) -> None:
    num_domains = min(len(raw) for raw in mixtures)
    carry = no_carry(num_domains)
    for raw in mixtures:
        if sum(raw[:num_domains]) <= 0:
            continue
        mixture = Mixture.from_shares(raw[:num_domains])
        before = carry
        counts, carry = apportion(mixture, global_sequences=batch, carry=carry)
        due = [share * batch for share in mixture.shares_q32]
        assert counts.sum() == batch
        for count, exact in zip(counts.tolist(), due, strict=True):
            assert exact // SHARE_ONE <= count <= -(-exact // SHARE_ONE)
        assert (carry == before + np.array(due) - counts * SHARE_ONE).all()
        assert carry.sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_domains=st.integers(1, 60),
    batch=st.integers(1, 300),
    changing=st.booleans(),
)
def test_the_sum_over_any_run_of_steps_stays_within_the_bound(
    seed: int, num_domains: int, batch: int, changing: bool
) -> None:
    rng = np.random.default_rng(seed)
    mixture = Mixture.from_shares(rng.dirichlet(np.full(num_domains, 0.3)).tolist())
    carry = no_carry(num_domains)
    for _ in range(200):
        if changing:
            mixture = Mixture.from_shares(rng.dirichlet(np.full(num_domains, 0.3)).tolist())
        _, carry = apportion(mixture, global_sequences=batch, carry=carry)
        assert np.abs(carry).max() <= (1 + math.log(num_domains)) * SHARE_ONE


def test_a_policy_that_plays_against_the_carry_does_not_pass_the_bound() -> None:
    # The cup game: each step's fraction is spread over the domains that are owed most so far.
    num_domains = 32
    carry = no_carry(num_domains)
    owed = np.arange(num_domains)
    for size in range(num_domains, 1, -1):
        owed = np.argsort(-carry, kind="stable")[:size]
        wanted = np.zeros(num_domains)
        wanted[owed] = 1.0
        mixture = Mixture.from_shares(wanted.tolist())
        _, carry = apportion(mixture, global_sequences=1, carry=carry)
        assert np.abs(carry).max() <= (1 + math.log(num_domains)) * SHARE_ONE


def test_a_hand_worked_example() -> None:
    mixture = Mixture.from_shares([0.5, 0.3, 0.2])
    carry = no_carry(3)
    seen = []
    for _ in range(4):
        counts, carry = apportion(mixture, global_sequences=4, carry=carry)
        seen.append(counts.tolist())
    # Due each step: 2.0, 1.2, 0.8. The half sequences go where most is owed.
    assert seen[0] == [2, 1, 1]
    assert np.sum(seen, axis=0).tolist() == [8, 5, 3]
