"""The actor (state -> mixture) and the critic (state, mixture -> value)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Actor(nn.Module):
    """A mixture for each state, with at least `floor` for every domain.

    The floor is part of the network, so that what is learned about is what is carried out.
    """

    def __init__(
        self,
        *,
        state_size: int,
        initial: Tensor,
        width: int,
        depth: int,
        floor: float,
        generator: torch.Generator,
    ) -> None:
        """Start near `initial`, [domains] shares above 0, whatever the state is."""
        super().__init__()
        self._floor = floor
        self._logits = mlp(state_size, len(initial), width, depth, generator)
        head = self._logits[-1]
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.mul_(_HEAD_SCALE)
            head.bias.copy_(initial.log())

    def forward(self, states: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return [batch, domains] shares; `noise` is added to the logits."""
        logits: Tensor = self._logits(states)
        if noise is not None:
            logits = logits + noise
        shares = torch.softmax(logits, dim=-1)
        return (1 - shares.shape[-1] * self._floor) * shares + self._floor


class Critic(nn.Module):
    """What rewards to expect from a mixture on: one value, or one for each domain."""

    def __init__(
        self,
        *,
        state_size: int,
        num_domains: int,
        num_values: int,
        width: int,
        depth: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._values = mlp(state_size + num_domains, num_values, width, depth, generator)

    def forward(self, states: Tensor, mixtures: Tensor) -> Tensor:
        """Return [batch, values]."""
        values: Tensor = self._values(torch.cat([states, mixtures], dim=-1))
        return values


def shares_of(
    actor: Actor, state: NDArray[np.float32], noise: Tensor | None = None
) -> NDArray[np.float64]:
    """Return the [domains] shares that the actor gives in a normalised state."""
    with torch.no_grad():
        shares = actor(torch.from_numpy(state)[None], noise)[0]
    exact: NDArray[np.float64] = shares.numpy().astype(np.float64)
    exact /= exact.sum()
    return exact


def flat(tensors: list[Any]) -> NDArray[np.float32]:
    """Return a copy of all tensors as one vector."""
    # numpy asks for huge pages, without which most of the time goes into page faults.
    values = np.empty(sum(tensor.numel() for tensor in tensors), np.float32)
    if tensors:
        with torch.no_grad():
            torch.cat([tensor.reshape(-1) for tensor in tensors], out=torch.from_numpy(values))
    return values


def split(values: NDArray[Any], network: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the network's parameters and their parts of a vector that `flat` returned; copies."""
    parameters = list(network.parameters())
    copied = torch.from_numpy(np.array(values))
    parts = torch.split(copied, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        yield parameter, part.view_as(parameter).clone()


@torch.no_grad()
def set_weights(network: nn.Module, values: NDArray[Any]) -> None:
    """Give a network the weights that `flat` returned of another."""
    for parameter, part in split(values, network):
        parameter.copy_(part)


_HEAD_SCALE = 0.01
"""A head this small lets its bias decide at first."""


def mlp(
    inputs: int, outputs: int, width: int, depth: int, generator: torch.Generator
) -> nn.Sequential:
    """Return `depth` x [Linear, LayerNorm, ReLU] and a linear head, initialised as torch would."""
    layers: list[nn.Module] = []
    for layer in range(depth):
        layers += [
            _linear(inputs if layer == 0 else width, width, generator),
            nn.LayerNorm(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, _linear(width, outputs, generator))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a layer as torch would, but from `generator`: the global one is the trainer's."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)
    return linear
