"""The `aioli` policy: a mixing law whose parameters are measured as the run goes on (2411.05735).

A round has `update_steps` steps. First it measures: in the order of `trial_rounds` permutations of
the domains it trains `trial_steps` steps, real ones, on each mixture p_i that has `focus` at domain
i and the rest spread evenly, and evaluates the model on held-out documents after each. With D[k, i]
the mean drop of loss k in the trials of domain i and P the trials' mixtures,

    A[k] = P^-1 D[k];  A -= min(A) if that is negative;  A /= sum(A)
    mean A <- (1 - g) A + g mean A;  p ~ exp(eta x column sums of mean A)

and p is trained on for the rest of the round. Where it differs from the published code, and why:

* The round begins with `trial_steps` steps under the mixture in force, after which the losses are
  evaluated that the first trial is measured from; the code evaluates before them, which costs the
  same, but for that the first step would have to wait.
* P is what was carried out, since guard and whole sequences lie between. If it cannot be solved for
  (a guard that allows no trials, an operator's override), the mixture in force stays.
* 200 steps a round are too few for many domains (22 domains need 440 to measure); null for
  `update_steps` makes a round twice as long as its measuring, but at least 200.
* A round of which an evaluation is missing changes nothing. The new mixture holds from the
  `control.lag`-th step after the last evaluation on, the one before it until then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import PolicyContext
from controller.policy.mixtures import resolve
from controller.policy.settings_of_rivals import AioliConfig
from controller.policy.trial_policy import TrialPolicy, missing_evaluation
from controller.policy.trials import Timetable
from protos.errors import ConfigError

PUBLISHED_ROUND = 200
MAX_CONDITION = 1e6
"""Of the trials' mixtures: beyond it they are too alike to be told apart."""


class AioliPolicy(TrialPolicy):
    """Measures, then trains on what the measured law says."""

    kept_arrays = ("law",)
    kept_values = ("num_rounds",)

    def __init__(self, config: AioliConfig, context: PolicyContext) -> None:
        """Make the timetable.

        Raises:
            ConfigError: a round is too short to measure all domains.
        """
        shares = np.asarray(resolve(config.initial, context))
        super().__init__(config, context, shares, focus=config.focus)
        self._config = config
        self._timetable = timetable(config, context)
        self._law = np.zeros((self._num_domains, self._num_domains))
        self._num_rounds = 0

    @property
    def phase(self) -> str:
        """`measuring` until the first law is known."""
        return "acting" if self._num_rounds else "measuring"

    def _favoured(self, step: int) -> int | None:
        trial = self._timetable.trial(step)
        if trial is None:
            return None
        turn, place = divmod(trial, self._num_domains)
        key = (self._context.seed, self._timetable.round(step), turn)
        return int(np.random.default_rng(key).permutation(self._num_domains)[place])

    def _learn(self, observation: StepObservation) -> None:
        step = observation.step
        favoured = self._favoured(step)
        if favoured is not None:
            self._trials.trained(favoured, observation.executed)
        if not self._timetable.validation.due(step):
            return
        if observation.validation_loss is None:
            self._trials.missed()
            raise ConfigError(missing_evaluation(self.name, step))
        if favoured is None:
            self._trials.begin(observation.validation_loss)
        elif self._trials.is_complete:
            self._trials.ended(favoured, observation.validation_loss, relative=False)
            if self._timetable.num_ended(step) == self._timetable.num_trials:
                self._solve()

    def _solve(self) -> None:
        mixtures = self._trials.executed
        if not np.linalg.cond(mixtures) < MAX_CONDITION:
            return
        drops = self._trials.drops / self._config.trial_rounds
        solved: NDArray[np.float64] = np.linalg.solve(mixtures, drops.T).T.astype(np.float64)
        law = normalised(solved)
        keep = self._config.law_smoothing if self._num_rounds else 0.0
        self._law = (1 - keep) * law + keep * self._law
        self._num_rounds += 1
        weights = np.exp(self._config.learning_rate * self._law.sum(axis=0))
        self._shares = weights / weights.sum()


def timetable(config: AioliConfig, context: PolicyContext) -> Timetable:
    """Return when a run measures.

    Raises:
        ConfigError: a round is too short to measure all domains.
    """
    num_trials = len(context.domains) * config.trial_rounds
    measuring = (num_trials + 1) * config.trial_steps
    round_steps = config.update_steps or max(PUBLISHED_ROUND, 2 * measuring)
    if measuring > round_steps:
        raise ConfigError(
            f"policy.update_steps {round_steps} is too short to measure {len(context.domains)} "
            f"domains, for which {measuring} steps are needed: raise it, or lower "
            "policy.trial_steps or policy.trial_rounds"
        )
    return Timetable(phase_steps=config.trial_steps, num_trials=num_trials, round_steps=round_steps)


def normalised(law: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a law without negative entries that adds up to 1; an even one if nothing is left."""
    raised: NDArray[np.float64] = law - min(law.min(), 0.0)
    total = raised.sum()
    return raised / total if total > 0 else np.full_like(raised, 1 / raised.size)
