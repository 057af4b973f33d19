"""Simulated training runs whose best mixtures are known.

A model is a vector x, and the loss of domain k is

    l_k(x) = base_k + 1/2 (x - centre_k)' A_k (x - centre_k) - slope_k' x

A step moves x against the gradients of the sequences that it had, each with noise of its own. The
score of a run is the mean of all domains' losses at its end, without noise. Because losses are
quadratic, mean and variance of x at the end of a run under fixed mixtures, and so the expected
score, are known exactly, and the best mixtures are found by descent on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.base import Policy, PolicyContext
from protos.apportion import apportion, no_carry
from protos.types import Mixture, Step

Vector = NDArray[np.float64]

TOKENS_PER_SEQUENCE = 64
LOSS_NOISE = 0.1
"""Standard deviation of a sequence's mean loss, in nats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The domains' losses as functions of x."""

    curvatures: NDArray[np.float64]
    """[domains, size, size]: A_k."""

    centres: Vector
    """[domains, size]"""

    slopes: Vector
    """[domains, size]"""

    bases: Vector
    """[domains]"""

    noise: Vector
    """[domains]: standard deviation of each coordinate of a sequence's gradient."""

    def losses(self, x: Vector) -> Vector:
        """[domains] losses at x."""
        away = x - self.centres
        bent = np.einsum("ki,kij,kj->k", away, self.curvatures, away) / 2
        return np.asarray(self.bases + bent - self.slopes @ x)

    def gradients(self, x: Vector) -> Vector:
        """[domains, size] gradients at x."""
        return np.asarray(np.einsum("kij,kj->ki", self.curvatures, x - self.centres) - self.slopes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Environment:
    """A run: its problem, which may change on the way, and how it is trained."""

    name: str
    problems: tuple[tuple[int, Problem], ...]
    """First step and problem, in order; the score goes by the sum of what each phase gained."""

    num_steps: int
    rate: float
    """How far x moves against the step's mean gradient."""

    global_sequences: int = 64
    lag: int = 2
    floor: float = 0.005

    @property
    def num_domains(self) -> int:
        return len(self.problems[0][1].bases)

    def context(self, seed: int) -> PolicyContext:
        """What a policy knows of the run; all domains have as many bytes."""
        return PolicyContext(
            domains=tuple(f"domain-{index}" for index in range(self.num_domains)),
            domain_sizes=(1.0,) * self.num_domains,
            num_steps=self.num_steps,
            global_sequences=self.global_sequences,
            seed=seed,
        )

    def problem_at(self, step: int) -> Problem:
        """The problem that holds at a step."""
        return [problem for first, problem in self.problems if first <= step][-1]

    def play(self, make: Callable[[PolicyContext], Policy], seed: int) -> Outcome:
        """Train a run that a policy steers."""
        policy = make(self.context(seed))
        rng = np.random.default_rng((seed, 77))
        x = np.zeros(self.problems[0][1].centres.shape[1])
        sealed = [tuple(policy.propose(Step(0)))] * self.lag
        carry = no_carry(self.num_domains)
        outcome = Outcome(score=0.0)
        for step in range(self.num_steps):
            problem = self.problem_at(step)
            shares = sealed.pop(0)
            outcome.mixtures.append(np.asarray(shares))
            counts, carry = apportion(
                Mixture.from_shares(shares), global_sequences=self.global_sequences, carry=carry
            )
            drawn = self._draw(problem, x, counts, rng)
            policy.observe(self._observation(step, shares, drawn, x))
            sealed.append(tuple(policy.propose(Step(step + self.lag))))
            before = problem.losses(x).mean()
            x = x - self.rate * drawn.summed.sum(axis=0) / self.global_sequences
            outcome.score += problem.losses(x).mean() - before
        outcome.policy = policy
        return outcome

    def _draw(
        self, problem: Problem, x: Vector, counts: NDArray[np.int64], rng: np.random.Generator
    ) -> Drawn:
        """Draw a step's sequences and their gradients."""
        domains = np.repeat(np.arange(self.num_domains), counts)
        noise = problem.noise[domains, None] * rng.normal(size=(len(domains), len(x)))
        gradients = problem.gradients(x)[domains] + noise
        summed = np.zeros((self.num_domains, len(x)))
        np.add.at(summed, domains, gradients)
        spread = LOSS_NOISE / np.sqrt(np.maximum(counts, 1))
        return Drawn(
            counts=counts,
            summed=summed,
            squares=np.bincount(domains, (gradients**2).sum(axis=1), self.num_domains).astype(
                float
            ),
            losses=problem.losses(x) + spread * rng.normal(size=self.num_domains),
        )

    def _observation(
        self, step: int, shares: Sequence[float], drawn: Drawn, x: Vector
    ) -> StepObservation:
        scale = TOKENS_PER_SEQUENCE
        tokens = drawn.counts * scale
        update = drawn.summed.sum(axis=0) / self.global_sequences
        return StepObservation(
            step=Step(step),
            num_steps=self.num_steps,
            planned=np.asarray(shares),
            sequences=drawn.counts,
            tokens=tokens,
            loss_sum=drawn.losses * tokens,
            alignment=drawn.summed @ drawn.summed.T * scale**2,
            weight_norms=np.array([np.linalg.norm(x)]),
            update_norms=np.array([self.rate * np.linalg.norm(update)]),
            part_square_norms=drawn.squares * scale**2,
            num_parts=drawn.counts,
        )

    def expected(self, mixtures: NDArray[np.float64]) -> float:
        """Return the expected score under [phases, domains] fixed mixtures."""
        size = self.problems[0][1].centres.shape[1]
        mean, covariance, score = np.zeros(size), np.zeros((size, size)), 0.0
        ends = [first for first, _ in self.problems[1:]] + [self.num_steps]
        for (first, problem), end, shares in zip(self.problems, ends, mixtures, strict=True):
            macro = problem.curvatures.mean(axis=0)
            before = problem.losses(mean).mean() + np.trace(macro @ covariance) / 2
            drift = np.tensordot(shares, problem.curvatures, 1)
            pull = shares @ (
                np.einsum("kij,kj->ki", problem.curvatures, problem.centres) + problem.slopes
            )
            keep = np.eye(size) - self.rate * drift
            fresh = self.rate**2 * (shares @ problem.noise**2) / self.global_sequences
            for _ in range(first, end):
                mean = keep @ mean + self.rate * pull
                covariance = keep @ covariance @ keep.T + fresh * np.eye(size)
            score += problem.losses(mean).mean() + np.trace(macro @ covariance) / 2 - before
        return float(score)

    def best(self) -> NDArray[np.float64]:
        """Return the best [phases, domains] fixed mixtures above the floor, by mirror descent."""
        k = self.num_domains
        logits = np.zeros((len(self.problems), k))

        def shares(of: Vector) -> Vector:
            weights = np.exp(of - of.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            return np.asarray((1 - k * self.floor) * weights + self.floor)

        step, value = 4.0, self.expected(shares(logits))
        while step > 0.05:
            slope = np.zeros_like(logits)
            for place in np.ndindex(*logits.shape):
                moved = logits.copy()
                moved[place] += 1e-3
                slope[place] = (self.expected(shares(moved)) - value) / 1e-3
            wanted = logits - step * slope / max(np.abs(slope).max(), 1e-12)
            reached = self.expected(shares(wanted))
            if reached < value - 1e-9:
                logits, value = wanted, reached
            else:
                step /= 2
        return shares(logits)

    def uniform(self) -> NDArray[np.float64]:
        """Return [phases, domains] shares, all alike."""
        return np.full((len(self.problems), self.num_domains), 1 / self.num_domains)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A step's sequences, by domain."""

    counts: NDArray[np.int64]
    summed: Vector
    """[domains, size]: sums of their gradients."""

    squares: Vector
    """[domains]: sums of their gradients' squared norms."""

    losses: Vector
    """[domains]: their mean losses."""


@dataclass(kw_only=True, eq=False)
class Outcome:
    """How a run went."""

    score: float
    """Change of the mean of all domains' losses; smaller is better."""

    mixtures: list[Vector] = field(default_factory=list)
    """Of each step."""

    policy: Policy | None = None

    def late(self, part: float = 0.25) -> Vector:
        """[domains]: mean shares of the last part of the run."""
        number = max(1, int(part * len(self.mixtures)))
        return np.asarray(np.mean(self.mixtures[-number:], axis=0))


@lru_cache
def bounds(environment: Environment) -> tuple[float, float]:
    """Return the expected scores of the uniform and of the best fixed mixtures."""
    return environment.expected(environment.uniform()), environment.expected(environment.best())


def gained(environment: Environment, score: float) -> float:
    """Return which part of the way from uniform to the best a score has come; 1: all of it."""
    uniform, best = bounds(environment)
    return (uniform - score) / (uniform - best)
