"""The controls that AC-ODM is held against: `align_eg`, `random_actor`, `shuffled_reward`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from controller.observation import StepObservation
from controller.policy.align_eg import AlignEgPolicy
from controller.policy.config import AcodmConfig, RandomActorConfig, ShuffledRewardConfig
from controller.policy.random_actor import RandomActorPolicy, across
from controller.policy.registry import make_policy
from controller.policy.settings_of_rivals import AlignEgConfig
from controller.policy.shuffled_reward import ShuffledRewardPolicy, permutation
from protos.errors import ConfigError
from protos.types import Step
from tests.fakes_policy import SimulatedRun, make_context

EVEN = (1 / 3, 1 / 3, 1 / 3)


def with_alignment(observation: StepObservation, gram: list[list[float]]) -> StepObservation:
    """The same step with `gram` for the inner products of the domains' mean gradients."""
    tokens = np.array([100, 100, 100])
    return replace(
        observation,
        sequences=np.array([1, 1, 1]),
        tokens=tokens,
        loss_sum=2.0 * tokens,
        alignment=np.array(gram) * 100.0 * 100.0,
    )


def test_align_eg_by_hand_over_two_steps() -> None:
    config = AlignEgConfig(
        initial="uniform", learning_rate=0.1, anchor_weight=2.0, reward_smoothing=0.0, floor=0.01
    )
    policy = AlignEgPolicy(config, make_context())
    run = SimulatedRun(context=make_context())
    # Of unit length; the sums of products with the others are 1.0, 0.8 and 0.2.
    gram = [[1, 0.8, 0.2], [0.8, 1, 0.0], [0.2, 0.0, 1]]
    scores = np.array([1.0, 0.8, 0.2])
    rewards = (scores - scores.mean()) / scores.std()

    policy.observe(with_alignment(run.observation(0, EVEN), gram))
    logits = 0.1 * rewards
    weights = np.exp(logits) / np.exp(logits).sum()
    assert policy.propose(Step(2)) == pytest.approx(0.97 * weights + 0.01)

    policy.observe(with_alignment(run.observation(1, EVEN), gram))
    logits = (1 - 0.1 * 2) * logits + 0.1 * rewards
    weights = np.exp(logits) / np.exp(logits).sum()
    assert policy.propose(Step(3)) == pytest.approx(0.97 * weights + 0.01)


def test_align_eg_settles_where_acodms_own_pull_would_leave_it() -> None:
    config = AlignEgConfig(learning_rate=0.2, anchor_weight=2.0, floor=0.0)
    policy = AlignEgPolicy(config, make_context())
    run = SimulatedRun(context=make_context())
    gram = [[1, 0.8, 0.2], [0.8, 1, 0.0], [0.2, 0.0, 1]]
    for step in range(300):
        policy.observe(with_alignment(run.observation(step, EVEN), gram))
    scores = np.array([1.0, 0.8, 0.2])
    aim = np.array([1, 2, 3]) * np.exp((scores - scores.mean()) / scores.std() / 2.0)
    assert policy.propose(Step(300)) == pytest.approx(aim / aim.sum(), rel=1e-3)


def test_align_eg_without_a_pull_gives_the_best_domain_all_that_the_floors_leave() -> None:
    config = AlignEgConfig(learning_rate=0.5, anchor_weight=0.0, floor=0.02)
    context = make_context()
    policy = AlignEgPolicy(config, context)
    SimulatedRun(context=context).play(policy, range(200))
    assert policy.propose(Step(200)) == pytest.approx((0.96, 0.02, 0.02), abs=0.01)


def test_align_eg_waits_for_an_alignment() -> None:
    policy = AlignEgPolicy(AlignEgConfig(), make_context())
    before = policy.propose(Step(0))
    observation = SimulatedRun(context=make_context()).observation(0, EVEN)
    policy.observe(replace(observation, alignment=None))
    assert policy.propose(Step(2)) == before


def test_a_random_actor_is_the_published_network_on_the_published_state() -> None:
    context = make_context(num_steps=50, seed=5)
    config = RandomActorConfig(width=32, depth=2, norm_layers=3, floor=0.0)
    policy = RandomActorPolicy(config, context)
    run = SimulatedRun(context=context)
    first, second = run.observation(0, EVEN), run.observation(1, EVEN)
    policy.observe(first)
    policy.observe(second)

    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU()),
        nn.Linear(32, 3),
    )
    network.load_state_dict(policy._actor.state_dict())
    parts = [
        torch.tensor(values, dtype=torch.float64)
        for values in (
            second.loss,
            second.loss - first.loss,
            second.sequences.astype(float),
            second.weight_norms,
            second.update_norms,
        )
    ]
    scaled = [((part - part.mean()) / (part.std() + 1e-8)).clamp(-3, 3) for part in parts]
    state = torch.cat([*scaled, torch.tensor([100 * 2 / 50])]).float()
    with torch.no_grad():
        wanted = torch.softmax(network(state), dim=-1)
    assert policy.propose(Step(3)) == pytest.approx(wanted.tolist(), rel=1e-4)


def test_random_actors_of_22_domains_stay_close_to_an_even_mixture() -> None:
    # What a check of the published network found: entropy of 96 to 98% of an even mixture's.
    entropies = []
    for seed in range(3):
        context = make_context(22, seed=seed)
        policy = RandomActorPolicy(RandomActorConfig(floor=0.0), context)
        shares = np.array(SimulatedRun(context=context).play(policy, range(3))[-1])
        entropies.append(-(shares * np.log(shares)).sum() / math.log(22))
    assert min(entropies) > 0.94
    assert max(entropies) < 0.99


def test_a_random_actor_never_learns() -> None:
    context = make_context()
    policy = RandomActorPolicy(RandomActorConfig(width=16, depth=2, norm_layers=4), context)
    run = SimulatedRun(context=context)
    before = {name: value.clone() for name, value in policy._actor.state_dict().items()}
    run.play(policy, range(30))
    for name, value in policy._actor.state_dict().items():
        assert torch.equal(value, before[name])
    # The same state gives the same mixture, whatever came between.
    policy.observe(run.observation(7, EVEN))
    once = policy.propose(Step(9))
    run.play(policy, range(8, 12))
    policy.observe(run.observation(7, EVEN))
    assert policy.propose(Step(9)) == once


def test_more_norms_than_a_random_actor_has_places_for_are_refused() -> None:
    context = make_context()
    policy = RandomActorPolicy(RandomActorConfig(width=16, norm_layers=2), context)
    with pytest.raises(ConfigError, match="norms of 3 layers at step 0, and policy.norm_layers is"):
        policy.observe(SimulatedRun(context=context).observation(0, EVEN))


def test_across_has_the_unbiased_spread_and_its_limits() -> None:
    assert across(np.array([1.0, 2.0, 3.0])) == pytest.approx([-1, 0, 1])
    assert across(np.array([4.0])).tolist() == [0.0]
    assert across(np.array([2.0, 2.0])).tolist() == [0.0, 0.0]
    assert across(np.array([0.0] * 30 + [1.0])).max() == 3.0


SMALL = {"width": 16, "depth": 2, "warmup_steps": 5, "batch_size": 4, "norm_layers": 4}


def test_shuffled_rewards_are_acodms_own_by_a_permutation_of_each_step() -> None:
    context = make_context(seed=3)
    run = SimulatedRun(context=context)
    plain = make_policy(AcodmConfig.model_validate(SMALL), context)
    shuffled = ShuffledRewardPolicy(ShuffledRewardConfig.model_validate(SMALL), context)
    num_moved = 0
    for step in range(20):
        observation = run.observation(step, EVEN)
        plain.observe(observation)
        shuffled.observe(observation)
    theirs, ours = plain.state().arrays, shuffled.state().arrays
    assert np.array_equal(theirs["replay.states"], ours["replay.states"])
    # The first step has no state before it, and so no transition.
    for row in range(19):
        order = permutation(3, row + 1, 3)
        assert ours["replay.rewards"][row].tolist() == theirs["replay.rewards"][row][order].tolist()
        num_moved += order.tolist() != [0, 1, 2]
    assert num_moved > 10


def test_permutations_favour_no_domain() -> None:
    drawn = np.array([permutation(0, step, 4) for step in range(4_000)])
    for place in range(4):
        counts = np.bincount(drawn[:, place], minlength=4)
        assert np.abs(counts - 1_000).max() < 120
    assert not np.array_equal(drawn, [permutation(1, step, 4) for step in range(4_000)])
