"""The `acodm` policy as it learns: AC-ODM as the method means it, with or without a proxy.

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
* No weight decay, and learning rates of 1e-4 (for the published width; more for narrower networks)
  and 1e-3: the code's 0.01 was set for an actor that was never stepped.
* gamma is 0.5, not the code's 0.95: in simulated runs of 300 steps that doubles what is gained.
* `own_term` can count a domain's product with itself: without it the reward says what a domain does
  for others, not what it does for the mean of all losses. The text and the code leave it out.
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
from controller.policy.acodm.diagnostics import of_mixture, of_rewards
from controller.policy.acodm.initial import initial_shares
from controller.policy.acodm.moments import RunningMoments
from controller.policy.acodm.proxy import (
    ACTING,
    LAYOUT,
    PLACES,
    Learned,
    in_order,
    opening_state,
    out_of_order,
    parts_of,
    take_over,
)
from controller.policy.acodm.replay import Replay
from controller.policy.acodm.reward import RewardTracker, statistics
from controller.policy.acodm.state import StateTracker, layout, norm_places, state_size
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
        """Build the networks from the run's seed, or from what another run has learned.

        Raises:
            ConfigError: the floor is too high for the number of domains, or the artefact of another
                run cannot be used.
        """
        num_domains = len(context.domains)
        learned = take_over(config, context) if config.proxy is not None else None
        config = learned.config if learned is not None else config
        self._config = config
        self._identity = learned.identity if learned is not None else config
        self._context = context
        self._order = learned.order if learned is not None else np.arange(num_domains)
        self._initial = initial_shares(config, context)[self._order]
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
        self._must_learn = False
        self._shares = self._initial
        if learned is not None:
            self._begin_with(learned)

    def _begin_with(self, learned: Learned) -> None:
        """Act from the first step, by what was learned elsewhere."""
        places = norm_places(len(self._initial), self._config.norm_layers)
        self._agent.restore(learned.parts["agent"])
        self._moments.restore(learned.parts["moments"])
        self._moments.forget(places)
        self._acting = True
        self._shares = self._agent.act(opening_state(self._moments))

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
        always = frozenset({Statistic.LOSS}) | statistics(self._config)
        return always | {Statistic.NORMS} if self._config.norm_layers else always

    def observe(self, observation: StepObservation) -> None:
        """Remember the step and choose the next mixture; what it teaches is learned by `learn`.

        An observation with a number that is not finite changes nothing.

        Raises:
            ConfigError: trainers report more weight norms than the state has places.
        """
        if not teaches(observation):
            return
        self._tracker.check(observation)
        self.learn()
        observation = in_order(observation, self._order)
        state = self._remember(observation)
        if not self._acting and self._warmed_up():
            self._agent.start_targets()
            self._acting = True
        self._shares = self._choose(state, observation)
        self._must_learn = True

    def propose(self, step: Step) -> Sequence[float]:
        """Return the mixture chosen at the last observation."""
        return tuple(out_of_order(self._shares, self._order).tolist())

    def diagnostics(self) -> dict[str, float]:
        """Tell how clear the reward is, how good the critic, and how far the actor has come."""
        figures = of_rewards(self._rewards.scores) | of_mixture(self._shares, self._initial)
        explained = self._agent.explained_variance
        if explained is not None:
            figures["critic_explained_variance"] = explained
        return figures

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

    def learn(self) -> None:
        """Learn from what is remembered, once an observation; else the next one begins with it."""
        if not self._must_learn:
            return
        self._must_learn = False
        if self._num_observed % self._config.update_every:
            return
        # What acts from the first step waits until there is enough to learn from.
        acts_untaught = self._config.proxy is not None and not self._warmed_up()
        if not len(self._replay) or acts_untaught:
            return
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
        """Return all that the learner is made of, when it has learned what it knows."""
        self.learn()
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
                HEADER: header_of(self._identity, self._context),
                LAYOUT: layout(len(self._initial), self._config.norm_layers),
                PLACES: [self._context.domains[index] for index in self._order],
                ACTING: self._acting,
                "num_observed": self._num_observed,
                "odm": dict(odm.values),
            },
        )

    def restore(self, state: PolicyState) -> None:
        """Go on from a state that `state` returned.

        Raises:
            ValueError: the state is of another policy, other domains or other settings.
        """
        check_header(state, self._identity, self._context)
        parts = parts_of(state)
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
        self._must_learn = False
        self._acting = bool(state.values[ACTING])
