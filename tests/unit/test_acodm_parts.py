"""Reward, state, moments and replay against examples worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.moments import LIMIT, RunningMoments
from controller.policy.acodm.replay import Replay
from controller.policy.acodm.reward import RewardTracker
from controller.policy.acodm.state import StateTracker, state_size
from protos.errors import ConfigError
from protos.types import Step

GRADIENTS = np.array([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
"""Mean gradients a token: |g| = 3, 4, 5; inner products 0, 9, 16."""

TOKENS = np.array([100, 200, 100])


def seen(gradients: NDArray[Any] = GRADIENTS, tokens: NDArray[Any] = TOKENS) -> StepObservation:
    summed = gradients * tokens[:, None]
    return StepObservation(
        step=Step(0),
        num_steps=100,
        planned=np.array([0.25, 0.5, 0.25]),
        sequences=tokens,
        tokens=tokens,
        loss_sum=np.array([3.0, 2.0, 1.0]) * tokens,
        alignment=summed @ summed.T,
        weight_norms=np.array([7.0]),
        update_norms=np.array([0.5]),
    )


def rewards_of(**settings: Any) -> RewardTracker:
    chosen = {
        "kind": "dot",
        "importance": "none",
        "own_term": "none",
        "smoothing": 0.5,
        "normalisation": "over_time",
        "horizon": 100,
    }
    return RewardTracker(3, **{**chosen, **settings})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"kind": "paper"}, [9, 16, 25]),
        ({"kind": "dot"}, [9 / 4, 16 / 4, 25 / 4]),
        ({"kind": "cosine"}, [9 / 15, 16 / 20, 9 / 15 + 16 / 20]),
        # Sums: each inner product times both shares, then over the domain's own share.
        (
            {"kind": "paper", "importance": "paper"},
            [9 * 0.25, 16 * 0.25, 9 * 0.25 + 16 * 0.5],
        ),
        ({"kind": "paper", "own_term": "raw"}, [9 + 9, 16 + 16, 25 + 25]),
        ({"kind": "dot", "own_term": "raw"}, [18 / 4, 32 / 4, 50 / 4]),
        (
            {"kind": "cosine", "own_term": "raw"},
            [1 + 9 / 15, 1 + 16 / 20, 1 + 9 / 15 + 16 / 20],
        ),
        (
            {"kind": "paper", "importance": "paper", "own_term": "raw"},
            [9 * 0.25 + 9 * 0.25, 16 * 0.5 + 16 * 0.25, 9 * 0.25 + 16 * 0.5 + 25 * 0.25],
        ),
    ],
)
def test_rewards_by_hand(settings: dict[str, str], wanted: list[float]) -> None:
    assert rewards_of(**settings).update(seen()) == pytest.approx(wanted)


def test_the_own_term_without_the_noise_of_the_domains_own_sequences() -> None:
    rng = np.random.default_rng(0)
    rewards = rewards_of(kind="paper", own_term="debiased", smoothing=0.0)
    noisy = rewards_of(kind="paper", own_term="raw", smoothing=0.0)
    parts = np.array([2, 4, 8])
    found, measured = [], []
    for _ in range(4000):
        of_parts = [
            GRADIENTS[k] * 10 + rng.normal(size=(number, 2)) * 50 for k, number in enumerate(parts)
        ]
        summed = np.stack([rows.sum(axis=0) for rows in of_parts])
        observation = replace(
            seen(tokens=parts * 10),
            alignment=summed @ summed.T,
            part_square_norms=np.array([(rows**2).sum() for rows in of_parts]),
            num_parts=parts,
        )
        found.append(rewards.update(observation))
        measured.append(noisy.update(observation))
    wanted = np.array([9 + 9, 16 + 16, 25 + 25])
    assert np.mean(found, axis=0) == pytest.approx(wanted, abs=1.5)
    # 2 coordinates x variance 25 a part, over the number of parts.
    assert np.mean(measured, axis=0) == pytest.approx(wanted + 50 / parts, abs=1.5)


def test_a_single_sequence_or_no_norms_leave_the_own_term_as_it_was() -> None:
    rewards = rewards_of(kind="paper", own_term="debiased", smoothing=0.0)
    assert rewards.update(seen()) == pytest.approx([9, 16, 25])  # not known: nothing
    parts = np.array([2, 1, 2])
    squares = (GRADIENTS**2).sum(axis=1) * (parts * 10) ** 2
    known = replace(seen(tokens=parts * 10), part_square_norms=squares / 2, num_parts=parts)
    # Two equal sequences: all of the square comes from their product.
    assert rewards.update(known) == pytest.approx([9 + 9, 16, 25 + 25])
    assert rewards.update(seen()) == pytest.approx([9 + 9, 16, 25 + 25])


def test_a_domain_drawn_more_often_scores_no_more_for_it() -> None:
    few = rewards_of().update(seen())
    many = rewards_of().update(seen(tokens=np.array([100, 200, 10_000])))
    assert few == pytest.approx(many)


def test_rewards_are_smoothed_from_the_first_value() -> None:
    rewards = rewards_of(kind="paper")
    rewards.update(seen())
    assert rewards.update(seen(GRADIENTS * 2)) == pytest.approx([22.5, 40, 62.5])


def test_a_domain_that_is_not_there_keeps_its_reward_and_its_products() -> None:
    rewards = rewards_of(kind="paper", smoothing=0.0)
    rewards.update(seen())
    later = rewards.update(seen(GRADIENTS * 2, np.array([100, 200, 0])))
    # <g0, g1> is new (still 0); the products with the third domain are the last ones.
    assert later == pytest.approx([9, 16, 25])


def test_a_domain_never_seen_gets_the_mean_of_the_others() -> None:
    rewards = rewards_of(kind="paper")
    assert rewards.update(seen(tokens=np.array([100, 0, 100]))) == pytest.approx([9, 9, 9])


def test_rewards_normalised_over_time_do_not_add_up_to_0() -> None:
    rewards = rewards_of(smoothing=0.0)
    rows = [
        rewards.update(seen(GRADIENTS * scale)) for scale in np.linspace(1, 2, 20, endpoint=True)
    ]
    sums = rewards.normalised(np.array(rows, np.float32)).sum(axis=1)
    assert np.abs(sums).max() > 0.5
    assert (np.diff(sums) > 0).all()  # a better step is told from a worse one


def test_rewards_normalised_across_domains_add_up_to_0() -> None:
    rewards = rewards_of(normalisation="across_domains")
    row = rewards.update(seen())[None].astype(np.float32)
    normal = rewards.normalised(row)
    assert normal.sum() == pytest.approx(0, abs=1e-6)
    assert normal.std() == pytest.approx(1)


def test_the_scale_of_the_gradients_does_not_matter() -> None:
    large, small = rewards_of(smoothing=0.0), rewards_of(smoothing=0.0)
    for scale in (1.0, 1.5, 0.7):
        one = large.update(seen(GRADIENTS * scale))
        other = small.update(seen(GRADIENTS * scale * 1e-6))
    normal = large.normalised(one[None].astype(np.float32))
    assert small.normalised(other[None].astype(np.float32)) == pytest.approx(normal, rel=1e-4)


def test_the_state_by_hand_over_two_steps() -> None:
    tracker = StateTracker(3, norm_layers=2)
    first = tracker.update(seen())
    assert len(first) == state_size(3, 2)
    # Of the 400 x 100 tokens that the run is going to have at this pace.
    log_tokens = [math.log(tokens / 40_001) for tokens in (101, 201, 101)]
    assert first == pytest.approx(
        np.array([3, 2, 1, 0, 0, 0, *log_tokens, 7, 0, 0.5, 0, 0.01]), rel=1e-6
    )
    second = replace(seen(tokens=np.array([100, 0, 100])), step=Step(1), weight_norms=np.zeros(0))
    log_tokens = [math.log(201 / 30_001)] * 3
    second = replace(second, loss_sum=np.array([250.0, 0, 150.0]))
    assert tracker.update(second) == pytest.approx(
        np.array([2.5, 2, 1.5, -0.5, 0, 0.5, *log_tokens, 7, 0, 0.5, 0, 0.02]), rel=1e-6
    )


def test_differences_are_from_the_step_before_not_from_the_first() -> None:
    tracker = StateTracker(3, norm_layers=1)
    for loss in (5.0, 4.0, 3.5):
        state = tracker.update(replace(seen(), loss_sum=loss * TOKENS))
    assert state[3:6] == pytest.approx([-0.5, -0.5, -0.5])


def test_more_norms_than_places_are_refused_and_say_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"policy.norm_layers is 1; set it to 2"):
        StateTracker(3, norm_layers=1).check(replace(seen(), update_norms=np.ones(2)))


def test_what_the_actor_sees_of_a_run_does_not_go_by_the_size_of_its_steps() -> None:
    states = []
    for tokens, num_steps in ((TOKENS, 100), (TOKENS * 1000, 100), (TOKENS * 1000, 200)):
        tracker = StateTracker(3, norm_layers=1)
        for step in range(num_steps // 2):
            observation = replace(seen(tokens=tokens), step=Step(step), num_steps=num_steps)
            state = tracker.update(observation)
        states.append(state)
    small, large, longer = states
    assert large == pytest.approx(small, abs=1e-3)
    assert longer == pytest.approx(small, abs=1e-3)


def test_moments_are_those_of_all_steps_until_the_horizon() -> None:
    values = np.random.default_rng(0).normal(5, 2, (50, 3))
    moments = RunningMoments(3, horizon=50)
    for value in values:
        moments.update(value)
    wanted = (values - values.mean(axis=0)) / values.std(axis=0)
    assert moments.normalised(values) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_moments_forget_beyond_the_horizon() -> None:
    moments = RunningMoments(1, horizon=5)
    for value in [0.0] * 50 + [10.0] * 50:
        moments.update(np.array([value]))
    assert moments.mean == pytest.approx(10, abs=1e-3)


def test_moments_can_be_kept_for_some_numbers_and_begun_anew_for_others() -> None:
    moments, own = RunningMoments(2, horizon=100), np.array([False, True])
    for value in (1.0, 3.0):
        moments.update(np.array([value, value]))
    moments.forget(own)
    for value in (10.0, 20.0):
        moments.update(np.array([value, value]), where=own)
    assert moments.mean.tolist() == [2.0, 15.0]
    assert moments.variance.tolist() == [1.0, 25.0]


def test_what_never_varies_is_0_and_what_jumps_is_cut_off() -> None:
    moments = RunningMoments(2, horizon=100)
    for step in range(20):
        moments.update(np.array([3.3, step % 2]))
    assert moments.normalised(np.array([3.3, 1e9])).tolist() == [0.0, LIMIT]


def push(replay: Replay, step: int) -> None:
    replay.push(
        step,
        state=np.full(2, step, np.float32),
        mixture=np.array([step, -step], np.float64),
        rewards=np.array([step / 2, 0.0]),
        next_state=np.full(2, step + 1, np.float32),
    )


def test_the_replay_forgets_the_oldest_first() -> None:
    replay = Replay(capacity=3, state_size=2, num_domains=2)
    for step in range(5):
        push(replay, step)
    assert len(replay) == 3
    assert replay.rows(np.arange(3)).states[:, 0].tolist() == [3, 4, 2]


def test_the_mixture_carried_out_next_is_known_one_step_later() -> None:
    replay = Replay(capacity=3, state_size=2, num_domains=2)
    push(replay, 0)
    assert replay.rows(np.array([0])).next_mixtures.tolist() == [[0, 0]]
    replay.follow(1, np.array([0.25, 0.75]))
    assert replay.rows(np.array([0])).next_mixtures.tolist() == [[0.25, 0.75]]


def test_a_mixture_after_a_gap_is_not_what_came_next() -> None:
    replay = Replay(capacity=3, state_size=2, num_domains=2)
    push(replay, 4)
    replay.follow(6, np.array([0.25, 0.75]))
    assert replay.rows(np.array([0])).next_mixtures.tolist() == [[4, -4]]


def test_a_full_replay_comes_back_from_its_arrays_and_goes_on_alike() -> None:
    replay = Replay(capacity=3, state_size=2, num_domains=2)
    for step in range(5):
        push(replay, step)
    other = Replay(capacity=3, state_size=2, num_domains=2)
    other.restore(replay.arrays())
    for ring in (replay, other):
        ring.follow(5, np.array([0.5, 0.5]))
        push(ring, 5)
    one, two = replay.arrays(), other.arrays()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_own_terms_are_smoothed_by_their_pairs_of_sequences() -> None:
    rewards = rewards_of(kind="paper", own_term="debiased", smoothing=0.5)
    others = rewards_of(kind="paper", smoothing=0.5)
    for number, square in ((2, 4.0), (3, 1.0)):
        parts = np.full(3, number)
        alignment = np.diag(np.full(3, square * 100))
        step = replace(
            seen(tokens=parts * 10),
            alignment=alignment,
            part_square_norms=np.full(3, 100.0),
            num_parts=parts,
        )
        both = rewards.update(step), others.update(step)
    # Squares less norms 300 and 0; pairs of 2 and 6, each of 10 x 10 tokens.
    first = 300 / 200
    second = (0.5 * 300 / 2 + 0.5 * 0) / (0.5 * 200 / 2 + 0.5 * 600)
    assert both[0] - both[1] == pytest.approx(0.5 * first + 0.5 * second)
