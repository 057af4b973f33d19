"""What a trial adds up from step to step, between two evaluations and over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from deploy.compare.pilot import Decision
from deploy.compare.record import Interval

Vector = NDArray[np.float64]


class IntervalTally:
    """The steps since the last evaluation."""

    def __init__(self, first_step: int, num_domains: int) -> None:
        self._first_step = first_step
        self._num_domains = num_domains
        self._observations: list[StepObservation] = []
        self._diagnostics: dict[str, list[float]] = {}

    def add(self, observation: StepObservation, decision: Decision) -> None:
        """Count a step."""
        self._observations.append(observation)
        for name, value in decision.diagnostics.items():
            self._diagnostics.setdefault(name, []).append(value)

    def interval(self) -> Interval:
        """Return the steps' means."""
        steps = self._observations
        sequences = np.sum([each.sequences for each in steps], axis=0)
        tokens = np.sum([each.tokens for each in steps], axis=0)
        loss_sum = np.sum([each.loss_sum for each in steps], axis=0)
        rewards = [
            plain_rewards(each.alignment, each.tokens)
            for each in steps
            if each.alignment is not None
        ]
        means, spread, noise = _moments(rewards, self._num_domains)
        return Interval(
            first_step=self._first_step,
            num_steps=len(steps),
            planned=np.mean([each.planned for each in steps], axis=0).tolist(),
            executed=(sequences / sequences.sum()).tolist(),
            train_loss=[
                float(total / count) if count else None
                for total, count in zip(loss_sum, tokens, strict=True)
            ],
            reward=means,
            reward_spread=spread,
            reward_noise=noise,
            diagnostics={
                name: float(np.mean(values)) for name, values in sorted(self._diagnostics.items())
            },
        )


def plain_rewards(alignment: Vector, tokens: NDArray[np.int64]) -> Vector:
    """Return each domain's inner product with the others' mean gradients over the mean norm.

    That is AC-ODM's `dot` reward of one step, neither smoothed nor normalised; NaN for a domain
    that the step did not have.
    """
    seen = tokens > 0
    counts = np.maximum(tokens, 1)
    gram = np.where(np.outer(seen, seen), alignment / np.outer(counts, counts), 0.0)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scores = gram.sum(axis=1) - np.diag(gram)
    scale = norms[norms > 0].mean() if norms.any() else 1.0
    return np.where(seen, scores / scale, np.nan)


def _moments(
    rewards: list[Vector], num_domains: int
) -> tuple[list[float | None], float | None, float | None]:
    """Return the domains' means, the spread between them and the noise within."""
    if not rewards:
        return [None] * num_domains, None, None
    table = np.vstack(rewards)
    seen = np.isfinite(table)
    counts = seen.sum(axis=0)
    means = np.where(seen, table, 0.0).sum(axis=0) / np.maximum(counts, 1)
    known = counts > 0
    listed = [float(mean) if count else None for mean, count in zip(means, counts, strict=True)]
    spread = float(means[known].std(ddof=1)) if known.sum() > 1 else None
    squares = np.where(seen, (table - means) ** 2, 0.0).sum(axis=0)
    often = counts > 1
    noise = None
    if often.any():
        noise = float(np.sqrt((squares[often] / (counts[often] - 1)).mean()))
    return listed, spread, noise


@dataclass(kw_only=True, slots=True)
class Totals:
    """What is counted over a whole trial; goes into its checkpoints."""

    planned_sequences: list[float]
    given_sequences: list[int]
    given_tokens: list[int]
    max_share_error_sequences: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    probe_s: float = 0.0
    held_decisions: int = 0
    guard_changes: dict[str, int] = field(default_factory=dict)
    decide_ms: list[float] = field(default_factory=list)
    policy_validations: int = 0
    resumed_at: list[int] = field(default_factory=list)

    @classmethod
    def zero(cls, num_domains: int) -> Totals:
        """Return the totals before the first step."""
        return cls(
            planned_sequences=[0.0] * num_domains,
            given_sequences=[0] * num_domains,
            given_tokens=[0] * num_domains,
        )

    def add(self, observation: StepObservation, decision: Decision) -> None:
        """Count a step."""
        planned = np.asarray(self.planned_sequences)
        planned = planned + observation.planned * observation.sequences.sum()
        given = np.asarray(self.given_sequences) + observation.sequences
        self.planned_sequences, self.given_sequences = planned.tolist(), given.tolist()
        self.given_tokens = (np.asarray(self.given_tokens) + observation.tokens).tolist()
        error = float(np.abs(planned - given).max())
        self.max_share_error_sequences = max(self.max_share_error_sequences, error)
        self.held_decisions += decision.held
        self.decide_ms.append(decision.decide_s * 1000)
        rules = Counter(self.guard_changes)
        rules.update({reason.partition(":")[0] for reason in decision.reasons})
        self.guard_changes = dict(rules)

    def values(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Totals:
        """Return what `values` gave."""
        return cls(**values)
