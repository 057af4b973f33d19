"""Laws that hold for every implementation, as functions that check them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from controller.observation import StepObservation
from controller.policy import artefact
from controller.policy.base import Policy, PolicyState
from protos.types import Step


def assert_is_mixture(shares: Sequence[float], num_domains: int, *, floor: float = 0.0) -> None:
    assert len(shares) == num_domains
    assert np.isfinite(shares).all()
    assert min(shares) >= floor * (1 - 1e-5)
    assert abs(sum(shares) - 1) < 1e-9


def assert_same_state(one: PolicyState, other: PolicyState) -> None:
    """Bit for bit."""
    assert one.values == other.values
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype, name
        assert array.shape == other.arrays[name].shape, name
        assert array.tobytes() == other.arrays[name].tobytes(), name


def assert_resumes_exactly(
    make: Callable[[], Policy], observations: Sequence[StepObservation], path: Path
) -> None:
    """Save and restore before every observation; going on must give what never stopping gives."""
    whole = make()
    states = []
    proposals = []
    for observation in observations:
        states.append(whole.state())
        whole.observe(observation)
        proposals.append(tuple(whole.propose(Step(observation.step + 1))))
    final = whole.state()
    for start, state in enumerate(states):
        artefact.save(state, path)
        resumed = make()
        resumed.restore(artefact.load(path))
        assert_same_state(resumed.state(), state)
        for index in range(start, len(observations)):
            resumed.observe(observations[index])
            step = Step(observations[index].step + 1)
            assert tuple(resumed.propose(step)) == proposals[index]
        assert_same_state(resumed.state(), final)


def assert_changes_nothing(policy: Policy, observation: StepObservation) -> None:
    before = policy.state()
    proposed = tuple(policy.propose(Step(observation.step + 1)))
    policy.observe(observation)
    assert_same_state(policy.state(), before)
    assert tuple(policy.propose(Step(observation.step + 1))) == proposed
