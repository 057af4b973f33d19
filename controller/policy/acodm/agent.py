"""The learner: actor, critic, their targets and optimisers, and one update of each.

Warm-up: the actor learns to repeat what was carried out, the critic to value it. After it, the
critic learns the value of the actor's own mixtures, and the actor what the critic values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import get_total_norm

from controller.policy.acodm.networks import (
    Actor,
    Critic,
    flat,
    set_weights,
    shares_of,
    split,
)
from controller.policy.config import AcodmConfig


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """Normalised transitions: [rows, state] and [rows, domains]."""

    states: Tensor
    mixtures: Tensor
    rewards: Tensor
    next_states: Tensor
    next_mixtures: Tensor


class Agent:
    """Knows nothing of steps or observations: batches in, mixtures out."""

    def __init__(
        self,
        config: AcodmConfig,
        *,
        state_size: int,
        initial: NDArray[np.float64],
        tau: float,
        generator: torch.Generator,
    ) -> None:
        self._config = config
        self._tau = tau
        # A domain that the initial mixture leaves out can still be learned.
        started = torch.as_tensor(initial, dtype=torch.float32).clamp_min(LEAST_INITIAL)
        self._anchor = started.log()
        self.actor = Actor(
            state_size=state_size,
            initial=started,
            width=config.width,
            depth=config.depth,
            floor=config.floor,
            generator=generator,
        )
        self.critic = Critic(
            state_size=state_size,
            num_domains=len(initial),
            num_values=len(initial) if config.critic == "vector" else 1,
            width=config.width,
            depth=config.depth,
            generator=generator,
        )
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self._fit = np.zeros(2)
        """The critic's mean squared error and the variance of its targets, lately."""

        self._optimisers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=actor_lr(config), fused=True),
            "critic": torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr, fused=True),
        }

    def act(self, state: NDArray[np.float32], noise: Tensor | None = None) -> NDArray[np.float64]:
        """Return the [domains] shares that the actor gives in a normalised state."""
        return shares_of(self.actor, state, noise)

    def warm_up(self, batch: Batch) -> None:
        """Clone the behaviour that filled the replay, and learn its value."""
        self._step("actor", mse_loss(self.actor(batch.states), batch.mixtures))
        self._step("critic", self._critic_loss(batch, self.warm_up_values(batch)))

    def start_targets(self) -> None:
        """Let the target networks be what was learned in the warm-up."""
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())

    def improve(self, batch: Batch) -> None:
        """Learn the value of the actor's mixtures, then better mixtures, then move the targets."""
        self._step("critic", self._critic_loss(batch, self.target_values(batch)))
        # The critic judges here, and must not learn to flatter.
        self.critic.requires_grad_(False)
        try:
            self._step("actor", self.actor_loss(batch.states))
        finally:
            self.critic.requires_grad_(True)
        self._follow(self.actor_target, self.actor)
        self._follow(self.critic_target, self.critic)

    @torch.no_grad()
    def warm_up_values(self, batch: Batch) -> Tensor:
        """Return what the critic should say of what was carried out, if it goes on (SARSA)."""
        following: Tensor = self.critic(batch.next_states, batch.next_mixtures)
        return self._returns(batch) + self._config.gamma * following

    @torch.no_grad()
    def target_values(self, batch: Batch) -> Tensor:
        """Return what the critic should say if the actor takes over after the step."""
        mixtures = self.actor_target(batch.next_states)
        following: Tensor = self.critic_target(batch.next_states, mixtures)
        return self._returns(batch) + self._config.gamma * following

    def actor_loss(self, states: Tensor) -> Tensor:
        """Return minus the value of the actor's mixtures.

        Values of domains are weighted by their shares: rewards normalised across domains add up to
        0, so their plain mean would be the same for every mixture.
        """
        mixtures = self.actor(states)
        values = self.critic(states, mixtures)
        value = (mixtures * values).sum(-1) if self._config.critic == "vector" else values[:, 0]
        loss: Tensor = -value.mean()
        if self._config.anchor_weight > 0:
            # Values are sums of rewards over 1 / (1 - gamma) steps; so is what they weigh against.
            weight = self._config.anchor_weight / (1 - self._config.gamma)
            loss = loss + weight * self._drift(mixtures).mean()
        return loss

    def _drift(self, mixtures: Tensor) -> Tensor:
        """Return [rows] relative entropies to the initial mixture."""
        drift: Tensor = (mixtures * (mixtures.log() - self._anchor)).sum(-1)
        return drift

    def _returns(self, batch: Batch) -> Tensor:
        """Return [rows, values]: a reward for each domain, or the mixture's."""
        if self._config.critic == "vector":
            return batch.rewards
        return (batch.mixtures * batch.rewards).sum(-1, keepdim=True)

    def _critic_loss(self, batch: Batch, wanted: Tensor) -> Tensor:
        loss = mse_loss(self.critic(batch.states, batch.mixtures), wanted)
        seen = np.array([loss.item(), wanted.var(correction=0).item()])
        self._fit += (1 - _FIT_MEMORY) * (seen - self._fit)
        return loss

    @property
    def explained_variance(self) -> float | None:
        """Part of the targets' variance that the critic foresees, lately; None: nothing varies."""
        error, variance = self._fit
        return float(1 - error / variance) if variance > 0 else None

    def _step(self, name: str, loss: Tensor) -> None:
        optimiser = self._optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = optimiser.param_groups[0]["params"]
        norm = get_total_norm([parameter.grad for parameter in parameters], error_if_nonfinite=True)
        # The optimiser divides gradients that are too long as it reads them: one pass less.
        scale = (norm / self._config.clip_norm).clamp_min(1.0)
        optimiser.grad_scale = scale  # type: ignore[attr-defined]  # as torch's GradScaler does
        optimiser.step()

    @torch.no_grad()
    def _follow(self, target: nn.Module, learned: nn.Module) -> None:
        torch._foreach_lerp_(list(target.parameters()), list(learned.parameters()), self._tau)

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "actor", self.actor
        yield "critic", self.critic
        yield "actor_target", self.actor_target
        yield "critic_target", self.critic_target

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs; copies."""
        arrays: dict[str, NDArray[Any]] = {
            f"{name}.weights": flat(list(network.parameters()))
            for name, network in self._networks()
        }
        arrays["fit"] = self._fit.copy()
        for name, optimiser in self._optimisers.items():
            states = list(optimiser.state.values())
            arrays[f"{name}.num_updates"] = np.array(
                int(states[0]["step"]) if states else 0, np.int64
            )
            for moment in _MOMENTS:
                arrays[f"{name}.{moment}"] = flat([state[moment] for state in states])
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `arrays` returned."""
        for name, network in self._networks():
            set_weights(network, arrays[f"{name}.weights"])
        self._fit = np.array(arrays["fit"], np.float64)
        for name, optimiser in self._optimisers.items():
            self._restore_optimiser(optimiser, name, arrays)

    def _restore_optimiser(
        self, optimiser: torch.optim.Adam, name: str, arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        optimiser.state.clear()
        num_updates = int(arrays[f"{name}.num_updates"])
        if not num_updates:
            return
        network = self.actor if name == "actor" else self.critic
        for parameter in network.parameters():
            optimiser.state[parameter] = {"step": torch.tensor(float(num_updates))}
        for moment in _MOMENTS:
            for parameter, part in split(arrays[f"{name}.{moment}"], network):
                optimiser.state[parameter][moment] = part


def actor_lr(config: AcodmConfig) -> float:
    """Return the actor's learning rate, also where the run file leaves it to the width."""
    return config.actor_lr or min(1e-4 * PUBLISHED_WIDTH / config.width, 3e-3)


PUBLISHED_WIDTH = 1024

LEAST_INITIAL = 1e-4
"""Stands for a share of 0 where its logarithm is needed."""

_FIT_MEMORY = 0.98
"""How much of what was known of the critic's fit stays at an update."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""As Adam calls its running means."""
