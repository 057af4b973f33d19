"""The `acodm` policy: AC-ODM without a proxy model, as the method means it.

From the published method (arXiv 2505.23878) and its code it keeps the state, the actor and critic,
the warm-up by behaviour cloning, and the reward by the inner products of the domains' gradients.
Where it differs, and why:

* The actor is stepped on its own loss, with the critic frozen. The published code steps the critic
  on the actor's loss: its actor stays random, and its critic learns to flatter.
* The actor maximises values weighted by its shares, J = sum of share x value, and rewards are
  normalised over time. The code maximises their plain mean, with rewards normalised across domains
  in each step: they add up to 0, so that no mixture is better than another.
* State and reward are normalised by means and variances over time, at the time of learning. The
  code normalises across domains, which loses the level; the text does not say.
* Differences in the state are between successive steps; the code's are from the first step. Tokens
  so far enter by their logarithm and progress as a part of 1, so that no input outgrows the rest.
* Rewards are smoothed (xi = 0.9; the text does not give its value) from the first value seen, not
  from 0. Gradients are means over tokens, for which the text's division by the share is not due;
  `importance: paper` has sums and the division.
* The replay holds the mixture that was carried out, not what the actor said: floor, guard and whole
  sequences lie between. A mixture comes into force `lag` steps after the state it was chosen for.
* In the warm-up the critic learns from the mixture carried out next (SARSA); the code's target of
  1.95 x the reward ignores the next state and is ten times off what follows.
* Noise on the actor's logits, falling to 0, explores after the warm-up; the code's noise is
  one-sided and can make shares negative. In the warm-up noise on the shares explores, as in the
  text, around `initial`.
* The actor starts at `initial` and has an explicit floor; the code draws every domain once a step.
* The actor is drawn towards `initial` (`anchor_weight`). Both the text's objective and the code's
  are linear in the shares, and the best mixture of a linear objective is a single domain.
* The targets' speed tau goes by the length of the run; 0.001 suits one of 41,667 steps.
* No weight decay, and learning rates of 1e-4 and 1e-3: the code's 0.01 was set for an actor that
  was never stepped.
* All of it is saved: networks, targets, optimisers, replay, moments, generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.acodm.agent import Agent, Batch
from controller.policy.acodm.initial import initial_shares
from controller.policy.acodm.moments import RunningMoments
from controller.policy.acodm.replay import Replay
from controller.policy.acodm.reward import RewardTracker
from controller.policy.acodm.state import StateTracker, state_size
from controller.policy.base import PolicyContext, PolicyState, Statistic
from controller.policy.config import AcodmConfig, OdmConfig
from controller.policy.finite import teaches
from controller.policy.header import HEADER, check_header, header_of
from controller.policy.mixtures import floored
from controller.policy.odm import WARMUP_SHARE, OdmPolicy
from protos.types import Step

_TARGET_UPDATES = 42
"""tau x steps of the published run: 0.001 x 41,667. A short run needs faster targets to learn."""


class AcodmPolicy:
    """Warm-up around the initial mixture, then the actor's mixtures, learning at every step."""

    def __init__(self, config: AcodmConfig, context: PolicyContext) -> None:
        """Build the networks from the run's seed.

        Raises:
            ConfigError: the floor is too high for the number of domains.
        """
        self._config = config
        self._context = context
        num_domains = len(context.domains)
        self._initial = initial_shares(config, context)
        self._warmup_steps = config.warmup_steps or max(
            config.batch_size, math.ceil(WARMUP_SHARE * context.num_steps)
        )
        size = state_size(num_domains, config.norm_layers)
        self._generator = torch.Generator().manual_seed(context.seed)
        self._agent = Agent(
            config,
            state_size=size,
            initial=self._initial,
            tau=config.tau or min(max(_TARGET_UPDATES / context.num_steps, 0.001), 0.05),
            generator=self._generator,
        )
        self._tracker = StateTracker(num_domains, config.norm_layers)
        self._moments = RunningMoments(size, horizon=config.moments_horizon)
        self._rewards = RewardTracker(
            num_domains,
            kind=config.reward,
            importance=config.importance,
            smoothing=config.reward_smoothing,
            own_term=config.own_term,
            normalisation=config.normalise,
            horizon=config.moments_horizon,
        )
        self._replay = Replay(
            capacity=config.replay_capacity, state_size=size, num_domains=num_domains
        )
        self._warmup_odm = OdmPolicy(OdmConfig(initial=config.initial, warmup_steps=0), context)
        self._last_state: NDArray[np.float32] | None = None
        self._num_observed = 0
        self._acting = False
        self._shares = self._initial

    @property
    def name(self) -> str:
        """As in the run file."""
        return self._config.name

    @property
    def phase(self) -> str:
        """`warm-up`, then `acting`."""
        return "acting" if self._acting else "warm-up"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Losses and alignment, and norms if the state has places for them."""
        always = frozenset({Statistic.LOSS, Statistic.ALIGNMENT})
        return always | {Statistic.NORMS} if self._config.norm_layers else always

    def observe(self, observation: StepObservation) -> None:
        """Remember the step, learn, and choose the next mixture.

        An observation with a number that is not finite changes nothing.

        Raises:
            ConfigError: trainers report more weight norms than the state has places.
        """
        if not teaches(observation):
            return
        self._tracker.check(observation)
        state = self._remember(observation)
        self._learn()
        self._shares = self._choose(state, observation)

    def propose(self, step: Step) -> Sequence[float]:
        """Return the mixture chosen at the last observation."""
        return tuple(self._shares.tolist())

    def _remember(self, observation: StepObservation) -> NDArray[np.float32]:
        executed = observation.executed
        self._replay.follow(observation.step, executed)
        state = self._tracker.update(observation)
        self._moments.update(state)
        if observation.alignment is not None:
            rewards = self._reward(observation)
            if self._last_state is not None:
                self._replay.push(
                    observation.step,
                    state=self._last_state,
                    mixture=executed,
                    rewards=rewards,
                    next_state=state,
                )
        if self._config.warmup_acting == "odm":
            self._warmup_odm.observe(observation)
        self._last_state = state
        self._num_observed += 1
        return state

    def _reward(self, observation: StepObservation) -> NDArray[np.float64]:
        """Return the [domains] rewards of a step with an alignment."""
        return self._rewards.update(observation)

    def _learn(self) -> None:
        if not len(self._replay):
            return
        if not self._acting and self._warmed_up():
            self._agent.start_targets()
            self._acting = True
        for _ in range(self._config.updates_per_step):
            if self._acting:
                self._agent.improve(self._batch())
            else:
                self._agent.warm_up(self._batch())

    def _warmed_up(self) -> bool:
        """Tell whether there were enough steps, and enough of them with an alignment."""
        enough = min(self._config.batch_size, self._config.replay_capacity, self._warmup_steps)
        return self._num_observed > self._warmup_steps and len(self._replay) >= enough

    def _batch(self) -> Batch:
        indices = torch.randint(
            len(self._replay), (self._config.batch_size,), generator=self._generator
        )
        rows = self._replay.rows(indices.numpy())
        return Batch(
            states=torch.from_numpy(self._moments.normalised(rows.states)),
            mixtures=torch.from_numpy(rows.mixtures),
            rewards=torch.from_numpy(self._rewards.normalised(rows.rewards)),
            next_states=torch.from_numpy(self._moments.normalised(rows.next_states)),
            next_mixtures=torch.from_numpy(rows.next_mixtures),
        )

    def _choose(
        self, state: NDArray[np.float32], observation: StepObservation
    ) -> NDArray[np.float64]:
        if self._acting:
            noise = self._noise(self._exploration(observation))
            return self._agent.act(self._moments.normalised(state), noise)
        if self._config.warmup_acting == "odm":
            proposal = np.asarray(self._warmup_odm.propose(observation.step))
            return floored(proposal, self._config.floor)
        noisy = self._initial + self._noise(self._config.warmup_noise).numpy().astype(np.float64)
        positive = np.maximum(noisy, 0.0)
        if not positive.any():
            return self._initial
        return floored(positive / positive.sum(), self._config.floor)

    def _noise(self, deviation: float) -> torch.Tensor:
        return deviation * torch.randn(len(self._context.domains), generator=self._generator)

    def _exploration(self, observation: StepObservation) -> float:
        """Return the standard deviation of the noise on the logits, falling to 0."""
        end = self._config.exploration_share * observation.num_steps
        left = max(0.0, 1 - (observation.step + 1) / end) if end > 0 else 0.0
        return self._config.exploration_noise * left

    def state(self) -> PolicyState:
        """Return all that the learner is made of."""
        odm = self._warmup_odm.state()
        parts = {
            "agent": self._agent.arrays(),
            "tracker": self._tracker.arrays(),
            "moments": self._moments.arrays(),
            "rewards": self._rewards.arrays(),
            "replay": self._replay.arrays(),
            "odm": odm.arrays,
        }
        arrays = {
            f"{part}.{name}": array for part, held in parts.items() for name, array in held.items()
        }
        arrays["shares"] = self._shares.copy()
        arrays["generator"] = self._generator.get_state().numpy().copy()
        if self._last_state is not None:
            arrays["last_state"] = self._last_state.copy()
        return PolicyState(
            arrays=arrays,
            values={
                HEADER: header_of(self._config, self._context),
                "num_observed": self._num_observed,
                "acting": self._acting,
                "odm": dict(odm.values),
            },
        )

    def restore(self, state: PolicyState) -> None:
        """Go on from a state that `state` returned.

        Raises:
            ValueError: the state is of another policy, other domains or other settings.
        """
        check_header(state, self._config, self._context)
        parts: dict[str, dict[str, NDArray[np.generic]]] = {}
        for name, array in state.arrays.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = array
        self._agent.restore(parts["agent"])
        self._tracker.restore(parts["tracker"])
        self._moments.restore(parts["moments"])
        self._rewards.restore(parts["rewards"])
        self._replay.restore(parts["replay"])
        self._warmup_odm.restore(PolicyState(arrays=parts["odm"], values=state.values["odm"]))
        self._shares = np.array(state.arrays["shares"], np.float64)
        self._generator.set_state(torch.from_numpy(np.array(state.arrays["generator"])))
        last = state.arrays.get("last_state")
        self._last_state = None if last is None else np.array(last, np.float32)
        self._num_observed = int(state.values["num_observed"])
        self._acting = bool(state.values["acting"])
