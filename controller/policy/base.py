"""What every mixing policy is."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from controller.observation import StepObservation
from protos.types import Step


class Statistic(enum.Enum):
    """What trainers measure for a policy; what no policy needs is not computed."""

    LOSS = "loss"
    ALIGNMENT = "alignment"  # inner products of the domains' gradients
    NORMS = "norms"  # of the watched weights, and of their change in a step
    VALIDATION = "validation"  # losses on held-out documents, in the steps that are due
    EXCESS = "excess"  # of the loss over that of a reference model
    GRADIENT_NOISE = "gradient_noise"  # squared norms of the sequences' gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyContext:
    """What a policy knows of its run before the first step."""

    domains: tuple[str, ...]
    domain_sizes: tuple[float, ...]
    """Bytes of text of each domain; what `natural` goes by."""

    num_steps: int
    global_sequences: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyState:
    """Everything that a policy needs to go on as if it had never stopped; no pickle anywhere."""

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""


@runtime_checkable
class Diagnosed(Protocol):
    """What a policy may have besides: figures by which to see whether it learns."""

    def diagnostics(self) -> dict[str, float]:
        """Return what is known now by name: finite numbers, cheap to tell."""


@runtime_checkable
class Learner(Protocol):
    """What a policy may have besides: learning that can wait until its mixture is announced."""

    def learn(self) -> None:
        """Learn from the last observation. The next one begins with it if nobody has asked."""


class Policy(Protocol):
    """Turns observations into mixtures. Deterministic, given its state.

    The controller runs, on one thread of its own:

        for each step s, when its reports are in:
            policy.observe(observation of s)
            shares = policy.propose(s + lag)
            policy.learn()  # if it is a Learner; nobody waits for it
    """

    @property
    def name(self) -> str:
        """As in the run file."""

    @property
    def phase(self) -> str:
        """What the policy is doing, in a word or two, e.g. `warm-up`."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """What the trainers must measure."""

    def observe(self, observation: StepObservation) -> None:
        """Learn from a step. An observation with a number that is not finite changes nothing."""

    def propose(self, step: Step) -> Sequence[float]:
        """Return the [domains] shares wanted for `step`: finite, not negative, adding up to 1."""

    def state(self) -> PolicyState:
        """Return what `restore` needs; arrays are copies."""

    def restore(self, state: PolicyState) -> None:
        """Go on from a state that the same policy with the same settings returned.

        Raises:
            ValueError: the state is of another policy, other domains or other settings.
        """
