"""The `acodm` policy in proxy mode, frozen: it acts by what another run has learned.

As in the published method the reward is not computed: trainers measure no gradients, and norms only
if the state has places for them. Unlike in the published code, which draws by ODM for the first 834
steps, the actor decides from step 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from controller.observation import StepObservation
from controller.policy.acodm.diagnostics import of_mixture
from controller.policy.acodm.moments import RunningMoments
from controller.policy.acodm.networks import Actor, set_weights, shares_of
from controller.policy.acodm.proxy import in_order, opening_state, out_of_order, parts_of, take_over
from controller.policy.acodm.state import StateTracker, norm_places, state_size
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.config import AcodmConfig
from controller.policy.finite import teaches
from controller.policy.header import HEADER, check_header, header_of
from controller.policy.mixtures import check_floor
from protos.types import Step


class FrozenAcodmPolicy:
    """The actor of an artefact, with no reward, no replay and nothing to learn."""

    def __init__(self, config: AcodmConfig, context: PolicyContext) -> None:
        """Read the artefact.

        Raises:
            ConfigError: it cannot be used, or the floor is too high for the number of domains.
        """
        learned = take_over(config, context)
        self._config = learned.config
        self._identity = learned.identity
        self._context = context
        self._order = learned.order
        num_domains = len(context.domains)
        check_floor(self._config.floor, num_domains)
        size = state_size(num_domains, self._config.norm_layers)
        self._actor = Actor(
            state_size=size,
            initial=torch.ones(num_domains),
            width=self._config.width,
            depth=self._config.depth,
            floor=self._config.floor,
            generator=torch.Generator().manual_seed(context.seed),
        ).requires_grad_(False)
        set_weights(self._actor, learned.parts["agent"]["actor.weights"])
        self._tracker = StateTracker(num_domains, self._config.norm_layers)
        self._own = norm_places(num_domains, self._config.norm_layers)
        self._moments = RunningMoments(size, horizon=self._config.moments_horizon)
        self._moments.restore(learned.parts["moments"])
        self._moments.forget(self._own)
        self._opening = shares_of(self._actor, opening_state(self._moments))
        self._shares = self._opening

    @property
    def name(self) -> str:
        """As in the run file."""
        return self._config.name

    @property
    def phase(self) -> str:
        """`frozen`."""
        return "frozen"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses, and norms if the state has places for them; never gradients."""
        always = frozenset({Statistic.LOSS})
        return always | {Statistic.NORMS} if self._config.norm_layers else always

    def observe(self, observation: StepObservation) -> None:
        """Take in the step and choose the next mixture.

        An observation with a number that is not finite changes nothing.

        Raises:
            ConfigError: trainers report more weight norms than the state has places.
        """
        if not teaches(observation):
            return
        self._tracker.check(observation)
        state = self._tracker.update(in_order(observation, self._order))
        self._moments.update(state, where=self._own)
        self._shares = shares_of(self._actor, self._moments.normalised(state))

    def propose(self, step: Step) -> Sequence[float]:
        """Return the mixture chosen at the last observation."""
        return tuple(out_of_order(self._shares, self._order).tolist())

    def diagnostics(self) -> dict[str, float]:
        """Tell of the mixture; `initial` is the one before the first step."""
        return of_mixture(self._shares, self._opening)

    def state(self) -> PolicyState:
        """Return what has been seen; the actor is in the artefact."""
        parts = {"tracker": self._tracker.arrays(), "moments": self._moments.arrays()}
        arrays = {
            f"{part}.{name}": array for part, held in parts.items() for name, array in held.items()
        }
        arrays["shares"] = self._shares.copy()
        header = header_of(self._identity, self._context)
        return PolicyState(arrays=arrays, values={HEADER: header})

    def restore(self, state: PolicyState) -> None:
        """Go on from a state that `state` returned.

        Raises:
            ValueError: the state is of another policy, artefact, domains or settings.
        """
        check_header(state, self._identity, self._context)
        parts = parts_of(state)
        self._tracker.restore(parts["tracker"])
        self._moments.restore(parts["moments"])
        self._shares = np.array(state.arrays["shares"], np.float64)
