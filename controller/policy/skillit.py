"""The `skillit` policy: Skill-It, by which domain helps which (2307.14430, as Aioli's code has it).

A[i, j] says by what part training on domain i lowers the loss of domain j. From it, and from the
losses L on held-out documents, evaluated every `update_steps` steps,

    p_i ~ exp(eta sum_j A[i, j] x sum of the last 3 L_j)

each time from an even mixture, not from the one before; p_0 with 1 in the place of the losses.
Where it differs from the published code, and why:

* The code learns A from a run of its own for each domain. Here the run begins by learning it:
  `graph_steps` steps on each domain alone, one domain after the other, the model evaluated before
  and after each. So later domains are measured on a model that has seen earlier ones; the steps are
  real ones of the run. `graph` names a JSON file of A, learned elsewhere, in the place of this.
* An evaluation every `update_steps` steps, where the code has its own schedule of evaluations and
  uses the last three at an update.
* A missed evaluation while the graph is learned ends that: shares stay even. A later one is left
  out of the three.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import PolicyContext
from controller.policy.settings_of_rivals import SkillitConfig
from controller.policy.trial_policy import TrialPolicy, missing_evaluation
from controller.policy.trials import Timetable
from protos.errors import ConfigError
from protos.spec import ValidationSpec

WINDOW = 3
"""Evaluations that an update adds up."""

GRAPH_SHARE = 4
"""One part in so many of the run learns the graph, where the run file does not say."""


class SkillitPolicy(TrialPolicy):
    """Learns the graph if none is given, then goes by it and by the losses."""

    kept_arrays = ("graph", "recent")
    kept_values = ("num_evaluations", "has_graph")

    def __init__(self, config: SkillitConfig, context: PolicyContext) -> None:
        """Read the graph, if one is named.

        Raises:
            ConfigError: it cannot be used, or the run is too short to learn one.
        """
        num_domains = len(context.domains)
        # A trial is of one domain alone.
        super().__init__(config, context, np.asarray(first_shares(config, context)), focus=1.0)
        self._config = config
        self._timetable = graph_timetable(config, context)
        self._updates = update_interval(config, context)
        self._graph = np.zeros((num_domains, num_domains))
        self._has_graph = config.graph is not None
        if config.graph is not None:
            self._graph = read_graph(config.graph, context)
        self._recent = np.zeros((WINDOW, num_domains))
        self._num_evaluations = 0

    @property
    def phase(self) -> str:
        """`learning the graph`, then `acting`."""
        return "acting" if self._has_graph else "learning the graph"

    def _favoured(self, step: int) -> int | None:
        return None if self._timetable is None else self._timetable.trial(step)

    def _learn(self, observation: StepObservation) -> None:
        step, losses = observation.step, observation.validation_loss
        learning = self._timetable is not None and self._timetable.validation.due(step)
        updating = self._updates.due(step)
        if losses is None:
            if learning:
                self._trials.missed()
            if learning or updating:
                raise ConfigError(missing_evaluation(self.name, step))
            return
        if learning:
            self._trial_ended(step, losses)
        if updating:
            self._recent = np.concatenate([self._recent[1:], losses[None]])
            self._num_evaluations += 1
        if self._has_graph and (learning or updating):
            weighed = self._recent.sum(axis=0) if self._num_evaluations else np.ones_like(losses)
            self._shares = by_graph(self._graph, weighed, self._config.learning_rate)

    def _trial_ended(self, step: int, losses: NDArray[np.float64]) -> None:
        assert self._timetable is not None
        favoured = self._timetable.trial(step)
        if favoured is None:
            self._trials.begin(losses)
        elif self._trials.is_complete:
            self._trials.ended(favoured, losses, relative=True)
            if self._timetable.num_ended(step) == self._num_domains:
                self._graph = self._trials.drops.T.copy()
                self._has_graph = True


def by_graph(
    graph: NDArray[np.float64], losses: NDArray[np.float64], learning_rate: float
) -> NDArray[np.float64]:
    """Return the [domains] shares in proportion to exp(eta graph losses)."""
    logits = learning_rate * (graph @ losses)
    weights = np.exp(logits - logits.max())
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def first_shares(config: SkillitConfig, context: PolicyContext) -> tuple[float, ...]:
    """Return the mixture that the run begins with.

    Raises:
        ConfigError: the graph cannot be used.
    """
    num_domains = len(context.domains)
    if config.graph is None:
        return (1 / num_domains,) * num_domains
    graph = read_graph(config.graph, context)
    return tuple(by_graph(graph, np.ones(num_domains), config.learning_rate).tolist())


def validation_of(config: SkillitConfig, context: PolicyContext) -> tuple[ValidationSpec, ...]:
    """Return when evaluations are due.

    Raises:
        ConfigError: the run is too short to learn a graph.
    """
    learning = graph_timetable(config, context)
    updates = update_interval(config, context)
    return (updates,) if learning is None else (learning.validation, updates)


def update_interval(config: SkillitConfig, context: PolicyContext) -> ValidationSpec:
    """Return when shares are renewed."""
    every = config.update_steps or max(1, context.num_steps // 100)
    return ValidationSpec(every=every, period=every, span=every)


def graph_timetable(config: SkillitConfig, context: PolicyContext) -> Timetable | None:
    """Return when the graph is learned; None: it is given.

    Raises:
        ConfigError: the run is too short for that.
    """
    if config.graph is not None:
        return None
    num_domains, num_steps = len(context.domains), context.num_steps
    steps = config.graph_steps or max(1, num_steps // (GRAPH_SHARE * (num_domains + 1)))
    if (num_domains + 1) * steps > num_steps:
        raise ConfigError(
            f"policy skillit learns its graph in {(num_domains + 1) * steps} steps of one domain "
            f"each, but the run has {num_steps}: lower policy.graph_steps, or name a policy.graph"
        )
    return Timetable(phase_steps=steps, num_trials=num_domains, round_steps=num_steps)


def read_graph(path: Path, context: PolicyContext) -> NDArray[np.float64]:
    """Return [domains, domains]: by what part training on the first lowers the second's loss.

    Raises:
        ConfigError: there is none at `path`, or it is of other domains.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.graph {path} cannot be read: {error}") from error
    domains = context.domains
    rows = found if isinstance(found, Mapping) else {}
    graph = np.full((len(domains), len(domains)), np.nan)
    for index, trained in enumerate(domains):
        row = rows.get(trained)
        for place, domain in enumerate(domains):
            value = row.get(domain) if isinstance(row, Mapping) else None
            if isinstance(value, int | float) and math.isfinite(value):
                graph[index, place] = value
    foreign = set(rows) - set(domains)
    if foreign or np.isnan(graph).any():
        raise ConfigError(
            f"policy.graph {path} must be a JSON object that gives for each of the run's domains "
            f"({', '.join(domains)}) an object with a number for each of them"
        )
    return graph
