"""A run without trainers: what their reports would add up to, from the mixture alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import Policy, PolicyContext
from protos.types import Step

TOKENS_PER_SEQUENCE = 100
LAG = 2


def make_context(
    num_domains: int = 3, *, num_steps: int = 100, global_sequences: int = 64, seed: int = 0
) -> PolicyContext:
    return PolicyContext(
        domains=tuple(f"domain-{index}" for index in range(num_domains)),
        domain_sizes=tuple(float(index + 1) for index in range(num_domains)),
        num_steps=num_steps,
        global_sequences=global_sequences,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """Losses fall with time; gradients of `good` domains point where all want to go."""

    context: PolicyContext
    good: tuple[int, ...] = (0,)
    probe_every: int = 1
    num_norms: int = 3
    size: int = 16

    def observation(self, step: int, shares: Sequence[float]) -> StepObservation:
        """What is seen at `step`: a function of the arguments alone."""
        rng = np.random.default_rng((self.context.seed, step))
        num_domains = len(self.context.domains)
        sequences = rng.multinomial(self.context.global_sequences, np.asarray(shares))
        tokens = sequences * TOKENS_PER_SEQUENCE
        loss = 4 - step / self.context.num_steps + rng.normal(0, 0.05, num_domains)
        return StepObservation(
            step=Step(step),
            num_steps=self.context.num_steps,
            planned=np.asarray(shares, np.float64),
            sequences=sequences,
            tokens=tokens,
            loss_sum=loss * tokens,
            alignment=None if step % self.probe_every else self._alignment(rng, tokens),
            weight_norms=10 + 0.01 * step + np.arange(self.num_norms, dtype=np.float64),
            update_norms=rng.uniform(0.1, 0.2, self.num_norms),
            validation_loss=np.maximum(loss + rng.normal(0, 0.02, num_domains), 0),
            excess_sum=rng.uniform(0, 1, num_domains) * tokens,
            part_square_norms=rng.uniform(1, 2, num_domains) * sequences * TOKENS_PER_SEQUENCE**2,
            num_parts=sequences,
        )

    def _alignment(
        self, rng: np.random.Generator, tokens: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        num_domains = len(tokens)
        direction = np.ones(self.size) / np.sqrt(self.size)
        pull = np.full(num_domains, 0.1)
        pull[list(self.good)] = 1.0
        noise = rng.normal(0, 0.2, (num_domains, self.size))
        summed = (pull[:, None] * direction + noise) * tokens[:, None]
        return np.asarray(summed @ summed.T)

    def play(self, policy: Policy, steps: range) -> list[Sequence[float]]:
        """Let `policy` steer; return what it proposed after each of `steps`."""
        sealed = [policy.propose(Step(0))] * LAG
        proposals = []
        for step in steps:
            policy.observe(self.observation(step, sealed.pop(0)))
            proposals.append(policy.propose(Step(step + LAG)))
            sealed.append(proposals[-1])
        return proposals


def without(observation: StepObservation, domain: int) -> StepObservation:
    """The same step, had it none of `domain`."""
    keep = np.ones(len(observation.tokens), np.int64)
    keep[domain] = 0
    alignment = observation.alignment
    return replace(
        observation,
        sequences=observation.sequences * keep,
        tokens=observation.tokens * keep,
        loss_sum=observation.loss_sum * keep,
        alignment=None if alignment is None else alignment * np.outer(keep, keep),
        excess_sum=_kept(observation.excess_sum, keep),
        part_square_norms=_kept(observation.part_square_norms, keep),
        num_parts=observation.num_parts * keep if observation.num_parts is not None else None,
    )


def _kept(
    values: NDArray[np.float64] | None, keep: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    return None if values is None else values * keep
