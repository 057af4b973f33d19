"""The learner's updates, and the faults of the published code that they must not have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from controller.policy.acodm.agent import Agent, Batch
from controller.policy.config import AcodmConfig

K, STATE, ROWS = 3, 5, 8
INITIAL = np.array([0.5, 0.3, 0.2])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_agent(**settings: object) -> Agent:
    config = AcodmConfig.model_validate({"width": 16, "depth": 2, "floor": 0.01, **settings})
    return Agent(
        config,
        state_size=STATE,
        initial=INITIAL,
        tau=0.1,
        generator=torch.Generator().manual_seed(0),
    )


def make_batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mixtures, following = torch.softmax(torch.randn(2, ROWS, K, generator=generator), -1)
    return Batch(
        states=torch.randn(ROWS, STATE, generator=generator),
        mixtures=mixtures,
        rewards=torch.randn(ROWS, K, generator=generator),
        next_states=torch.randn(ROWS, STATE, generator=generator),
        next_mixtures=following,
    )


def weights(network: torch.nn.Module) -> torch.Tensor:
    return parameters_to_vector(network.parameters()).detach().clone()


def test_the_actor_starts_at_the_initial_mixture_whatever_the_state() -> None:
    agent = make_agent()
    for state in (np.zeros(STATE, np.float32), np.full(STATE, 5, np.float32)):
        assert agent.act(state) == pytest.approx(INITIAL, abs=0.02)


def test_a_published_network_has_as_many_weights_as_published() -> None:
    generator = torch.Generator().manual_seed(0)
    agent = Agent(
        AcodmConfig(), state_size=85, initial=np.full(22, 1 / 22), tau=0.001, generator=generator
    )
    assert len(weights(agent.actor)) == 4_319_254
    assert len(weights(agent.critic)) == 4_341_782


@pytest.mark.parametrize("head", ["vector", "scalar"])
def test_the_warm_up_values_what_was_carried_out_next(head: str) -> None:
    agent, batch = make_agent(critic=head, gamma=0.5), make_batch()
    following = agent.critic(batch.next_states, batch.next_mixtures)
    reward = batch.rewards
    if head == "scalar":
        reward = (batch.mixtures * batch.rewards).sum(-1, keepdim=True)
    assert torch.allclose(agent.warm_up_values(batch), reward + 0.5 * following)


@pytest.mark.parametrize("head", ["vector", "scalar"])
def test_after_it_the_critic_values_what_the_target_actor_would_do(head: str) -> None:
    agent, batch = make_agent(critic=head, gamma=0.5), make_batch()
    agent.warm_up(batch)  # the targets differ from what is learned
    mixtures = agent.actor_target(batch.next_states)
    following = agent.critic_target(batch.next_states, mixtures)
    reward = batch.rewards
    if head == "scalar":
        reward = (batch.mixtures * batch.rewards).sum(-1, keepdim=True)
    wanted = agent.target_values(batch)
    assert torch.allclose(wanted, reward + 0.5 * following)
    assert not wanted.requires_grad


def test_without_a_future_the_critic_learns_the_reward() -> None:
    agent, batch = make_agent(gamma=0.0), make_batch()
    for _ in range(600):
        agent.warm_up(batch)
    assert torch.allclose(agent.critic(batch.states, batch.mixtures), batch.rewards, atol=0.1)


def test_the_warm_up_teaches_the_actor_to_repeat_what_was_carried_out() -> None:
    agent, batch = make_agent(actor_lr=1e-2), make_batch()
    for _ in range(300):
        agent.warm_up(batch)
    assert torch.allclose(agent.actor(batch.states), batch.mixtures, atol=0.05)


@pytest.mark.parametrize("head", ["vector", "scalar"])
def test_the_actor_is_stepped_on_its_own_loss(head: str) -> None:
    agent, batch = make_agent(critic=head), make_batch()
    before = weights(agent.actor)
    agent.improve(batch)
    assert not torch.equal(weights(agent.actor), before)


def test_the_actors_loss_leaves_no_trace_in_the_critic() -> None:
    one, other = make_agent(), make_agent(actor_lr=0.5, anchor_weight=0.0)
    batch = make_batch()
    one.improve(batch)
    other.improve(batch)
    assert not torch.equal(weights(one.actor), weights(other.actor))
    # However the actor learns, the critic has learned from the rewards alone.
    assert torch.equal(weights(one.critic), weights(other.critic))
    assert all(parameter.requires_grad for parameter in one.critic.parameters())


def test_the_actors_gradient_tells_mixtures_apart_when_rewards_add_up_to_0() -> None:
    agent = make_agent(anchor_weight=0.0, gamma=0.0, actor_lr=1e-3)
    batch = make_batch()
    batch.rewards.copy_(torch.tensor([1.0, -0.5, -0.5]).expand(ROWS, K))
    agent.start_targets()
    for _ in range(300):
        agent.improve(batch)
    assert agent.actor(batch.states)[:, 0].min() > 0.8


def test_the_anchor_gives_the_share_that_it_promises() -> None:
    agent = make_agent(anchor_weight=0.5, gamma=0.0, actor_lr=1e-2, floor=0.0)
    batch = make_batch()
    rewards = torch.tensor([0.5, 0.0, -0.5])
    batch.rewards.copy_(rewards.expand(ROWS, K))
    for _ in range(600):
        agent.improve(batch)
    wanted = torch.tensor(INITIAL) * torch.exp(rewards / 0.5)
    wanted = (wanted / wanted.sum()).float()
    assert torch.allclose(agent.actor(batch.states).mean(0), wanted, atol=0.05)


def test_targets_follow_by_tau() -> None:
    agent, batch = make_agent(), make_batch()
    old = weights(agent.actor_target), weights(agent.critic_target)
    agent.improve(batch)
    for target, learned, before in zip(
        (agent.actor_target, agent.critic_target), (agent.actor, agent.critic), old, strict=True
    ):
        assert torch.allclose(weights(target), 0.9 * before + 0.1 * weights(learned), atol=1e-6)


def test_the_floor_is_part_of_the_actor() -> None:
    agent = make_agent(floor=0.1, anchor_weight=0.0, actor_lr=0.1)
    batch = make_batch()
    for _ in range(50):
        agent.improve(batch)
    assert agent.actor(100 * batch.states).min() >= 0.1 - 1e-6
