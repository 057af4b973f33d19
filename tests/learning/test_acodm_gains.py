"""AC-ODM where domains interact and where not, beside its rivals and with planted faults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from controller.policy.acodm import policy as policy_module
from controller.policy.acodm.agent import Agent, Batch
from controller.policy.acodm.policy import AcodmPolicy
from controller.policy.config import PolicyConfig
from tests.learning import worlds
from tests.learning.contenders import ACODM, BOLD, CONTENDERS, DEBIASED, play
from tests.learning.environments import Environment, Outcome, bounds, gained

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WORLDS = {make.__name__: make() for make in worlds.EVERYWHERE}
INTERACTING = [make.__name__ for make in worlds.INTERACTING]


@lru_cache
def outcome(name: str, contender: str) -> Outcome:
    return play({**CONTENDERS, "bold": BOLD}[contender], WORLDS[name])


def gain(name: str, contender: str) -> float:
    return gained(WORLDS[name], outcome(name, contender).score)


@pytest.mark.parametrize("name", INTERACTING)
def test_where_domains_interact_it_beats_uniform_odm_chance_and_rewards_without_meaning(
    name: str,
) -> None:
    ours = gain(name, "acodm")
    assert ours > 0.1
    for rival in ("uniform", "odm", "random_actor", "shuffled_reward"):
        assert ours > gain(name, rival) + 0.05, rival


@pytest.mark.parametrize("name", INTERACTING)
def test_it_comes_near_the_best_mixture_with_the_own_term_and_a_weak_anchor(name: str) -> None:
    assert gain(name, "bold") > (0.35 if name == "drifting" else 0.6)


@pytest.mark.parametrize("name", INTERACTING)
def test_the_own_term_without_noise_loses_nothing(name: str) -> None:
    assert gain(name, "acodm, own term debiased") > gain(name, "acodm") - 0.03


def test_it_follows_when_another_domain_begins_to_help() -> None:
    mixtures = np.array(outcome("drifting", "bold").mixtures)
    first, second = mixtures[: worlds.STEPS], mixtures[worlds.STEPS :]
    assert first[-60:].mean(axis=0).argmax() == 0
    assert second[-60:].mean(axis=0).argmax() == 1


def test_it_finds_the_domain_that_helps_others_where_losses_would_starve_it() -> None:
    assert outcome("helper", "odm").late()[0] < 0.1
    assert outcome("helper", "acodm").late()[0] > 0.3


@pytest.mark.parametrize("contender", ["acodm", "acodm, own term debiased"])
def test_where_mixing_does_not_matter_it_loses_nothing(contender: str) -> None:
    uniform, _ = bounds(WORLDS["neutral"])
    ours = outcome("neutral", contender)
    assert ours.score == pytest.approx(uniform, rel=0.005)
    assert np.abs(ours.late() - 1 / 6).max() < 0.08


def test_strangers_are_served_by_their_own_terms_and_not_harmed_without() -> None:
    assert gain("strangers", "acodm") > -0.5
    assert gain("strangers", "acodm, own term debiased") > 0.15


# Faults of the published code (their numbers in the specification), each planted and caught.


def _flattering(agent: Agent, batch: Batch) -> None:
    """Back-propagate the actor's loss into the critic, too, as the code does."""
    agent._step("critic", agent._critic_loss(batch, agent.target_values(batch)))
    for optimiser in agent._optimisers.values():
        optimiser.zero_grad()
    agent.actor_loss(batch.states).backward()  # type: ignore[no-untyped-call]


class SteppingTheCritic(Agent):
    """Fault 1: the critic's optimiser is stepped on the actor's loss, the actor's never."""

    def improve(self, batch: Batch) -> None:
        _flattering(self, batch)
        self._optimisers["critic"].step()
        self._follow(self.actor_target, self.actor)
        self._follow(self.critic_target, self.critic)

    def warm_up(self, batch: Batch) -> None:
        self._step("critic", self._critic_loss(batch, self.warm_up_values(batch)))
        mse_loss(self.actor(batch.states), batch.mixtures).backward()  # type: ignore[no-untyped-call]
        self._optimisers["critic"].step()


class FlatteringCritic(Agent):
    """Fault 2: the actor is stepped, but the critic learns from the actor's loss to praise it."""

    def improve(self, batch: Batch) -> None:
        _flattering(self, batch)
        for optimiser in self._optimisers.values():
            optimiser.step()
        self._follow(self.actor_target, self.actor)
        self._follow(self.critic_target, self.critic)


class PlainMean(Agent):
    """Fault 3: the actor maximises the plain mean over domains, of rewards that add up to 0."""

    def actor_loss(self, states: Tensor) -> Tensor:
        mixtures = self.actor(states)
        loss: Tensor = -self.critic(states, mixtures).mean()
        weight = self._config.anchor_weight / (1 - self._config.gamma)
        return loss + weight * self._drift(mixtures).mean()


def the_actor_learns(environment: Environment, config: PolicyConfig) -> None:
    """The mixture must come a part of the way to the best one."""
    ours = play(config, environment)
    assert gained(environment, ours.score) > 0.15
    assert ours.late()[0] > ours.late()[4] + 0.1


def the_critic_is_honest(environment: Environment, config: PolicyConfig) -> None:
    """What the critic says of the actor's mixtures must be what rewards say, on average.

    Here rewards are the same whatever the mixture is, and nothing comes after (gamma 0).
    """
    policy = play(config.model_copy(update={"gamma": 0.0}), environment).policy
    assert isinstance(policy, AcodmPolicy)
    agent = policy._agent
    batches = [policy._batch() for _ in range(8)]
    with torch.no_grad():
        excess = [
            (mixtures * (agent.critic(batch.states, mixtures) - batch.rewards)).sum(-1).mean()
            for batch in batches
            for mixtures in (agent.actor(batch.states),)
        ]
    assert abs(float(torch.stack(excess).mean())) < 0.2


BANDIT = WORLDS["bandit"]
ACROSS = ACODM.model_copy(update={"normalise": "across_domains"})


def test_without_a_planted_fault_the_laws_hold() -> None:
    the_actor_learns(BANDIT, ACODM)
    the_actor_learns(BANDIT, ACROSS)
    the_critic_is_honest(BANDIT, ACODM)


@pytest.mark.parametrize(
    ("fault", "config", "law"),
    [
        (SteppingTheCritic, ACODM, the_actor_learns),
        (FlatteringCritic, ACODM, the_critic_is_honest),
        (PlainMean, ACROSS, the_actor_learns),
    ],
    ids=["1: the actor is never stepped", "2: the critic flatters", "3: the objective is flat"],
)
def test_a_planted_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, fault: type[Agent], config: PolicyConfig, law: Any
) -> None:
    monkeypatch.setattr(policy_module, "Agent", fault)
    with pytest.raises(AssertionError):
        law(BANDIT, config)


def test_the_debiased_own_term_asks_trainers_for_what_it_needs() -> None:
    needs = [
        {statistic.value for statistic in AcodmPolicy(config, BANDIT.context(0)).needs}
        for config in (ACODM, DEBIASED)
    ]
    assert needs[1] - needs[0] == {"gradient_noise"}
