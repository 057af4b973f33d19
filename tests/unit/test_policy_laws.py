"""What every policy obeys, run over all of them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controller.policy.base import Policy, PolicyContext, Statistic
from controller.policy.config import (
    AcodmConfig,
    NaturalConfig,
    OdmConfig,
    OdmPaperConfig,
    PolicyConfig,
    RandomActorConfig,
    ScheduleConfig,
    SchedulePoint,
    ShuffledRewardConfig,
    StaticConfig,
    UniformConfig,
)
from controller.policy.registry import initial_mixture, make_policy, validation_of
from controller.policy.settings_of_rivals import (
    AdoConfig,
    AioliConfig,
    AlignEgConfig,
    DogeConfig,
    DoremiConfig,
    PikeConfig,
    ReplayMeanConfig,
    SkillitConfig,
)
from protos.types import Step
from tests.fakes_policy import SimulatedRun, make_context, without
from tests.laws import (
    assert_changes_nothing,
    assert_is_mixture,
    assert_resumes_exactly,
    assert_same_state,
)

SMALL = AcodmConfig(
    width=16, depth=2, warmup_steps=5, batch_size=4, norm_layers=4, replay_capacity=9
)

POLICIES: dict[str, PolicyConfig] = {
    "static": StaticConfig(mixture={"domain-0": 3}),
    "natural": NaturalConfig(),
    "uniform": UniformConfig(),
    "schedule": ScheduleConfig(
        points=(
            SchedulePoint(step=0, mixture="natural"),
            SchedulePoint(step=7, mixture={"domain-0": 1}),
        )
    ),
    "odm": OdmConfig(warmup_steps=3),
    "odm_paper": OdmPaperConfig(warmup_steps=3),
    "ado": AdoConfig(fit_every=4, ignore_steps=0, smoothing_window=5),
    "doremi": DoremiConfig(),
    "doge": DogeConfig(),
    "skillit": SkillitConfig(graph_steps=1, update_steps=3),
    "aioli": AioliConfig(trial_steps=1, trial_rounds=1, update_steps=40),
    "pike": PikeConfig(update_steps=3),
    "align_eg": AlignEgConfig(),
    "random_actor": RandomActorConfig(width=16, depth=2, norm_layers=4),
    "shuffled_reward": ShuffledRewardConfig(**SMALL.model_dump(exclude={"name"})),
    "replay_mean": ReplayMeanConfig.model_validate({"from": "mean.json"}),
    "acodm": SMALL,
    "acodm scalar": SMALL.model_copy(
        update={"critic": "scalar", "reward": "cosine", "normalise": "across_domains"}
    ),
    "acodm odm": SMALL.model_copy(
        update={"warmup_acting": "odm", "reward": "paper", "importance": "paper"}
    ),
}

BLIND = ("static", "natural", "uniform", "schedule", "replay_mean")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(config: PolicyConfig, context: PolicyContext) -> Policy:
    """The policy, and the file that it reads if it reads one."""
    if isinstance(config, ReplayMeanConfig):
        shares = dict(zip(context.domains, context.domain_sizes, strict=True))
        config.source.write_text(json.dumps(shares))
    return make_policy(config, context)


@pytest.fixture(params=POLICIES, ids=str)
def config(request: pytest.FixtureRequest) -> PolicyConfig:
    return POLICIES[request.param]


@pytest.mark.parametrize("num_domains", [1, 3, 30])
def test_a_policy_proposes_mixtures(config: PolicyConfig, num_domains: int) -> None:
    context = make_context(num_domains)
    policy = made(config, context)
    floor = getattr(config, "floor", 0.0)
    assert_is_mixture(policy.propose(Step(0)), num_domains, floor=floor)
    for proposal in SimulatedRun(context=context).play(policy, range(15)):
        assert_is_mixture(proposal, num_domains, floor=floor)


def test_the_initial_mixture_is_the_first_proposal(config: PolicyConfig) -> None:
    context = make_context()
    proposal = made(config, context).propose(Step(0))
    assert initial_mixture(config, context) == tuple(proposal)


def test_the_same_seed_gives_the_same_mixtures(config: PolicyConfig) -> None:
    context = make_context()
    first, second = made(config, context), made(config, context)
    torch.manual_seed(1)
    one = SimulatedRun(context=context).play(first, range(15))
    torch.manual_seed(2)
    assert SimulatedRun(context=context).play(second, range(15)) == one
    assert_same_state(first.state(), second.state())


def test_a_policy_leaves_the_global_generators_alone(config: PolicyConfig) -> None:
    of_torch, of_numpy = torch.get_rng_state(), np.random.get_state(legacy=False)
    context = make_context()
    SimulatedRun(context=context).play(made(config, context), range(8))
    assert torch.equal(torch.get_rng_state(), of_torch)
    assert str(np.random.get_state(legacy=False)) == str(of_numpy)


@pytest.mark.parametrize("probe_every", [1, 3])
def test_saved_and_restored_anywhere_a_policy_goes_on_as_if_never_stopped(
    config: PolicyConfig, probe_every: int, tmp_path: Path
) -> None:
    context = make_context()
    run = SimulatedRun(context=context, probe_every=probe_every)
    observations = [run.observation(step, (0.5, 0.25, 0.25)) for step in range(15)]
    assert_resumes_exactly(
        lambda: made(config, context), observations, tmp_path / "policy.safetensors"
    )


MEASURED = (
    "loss_sum",
    "alignment",
    "weight_norms",
    "update_norms",
    "planned",
    "validation_loss",
    "excess_sum",
    "part_square_norms",
)


@pytest.mark.parametrize("steps", [0, 12])
def test_a_number_that_is_not_finite_changes_nothing(config: PolicyConfig, steps: int) -> None:
    context = make_context()
    run = SimulatedRun(context=context)
    policy = made(config, context)
    run.play(policy, range(steps))
    observation = run.observation(steps, (0.5, 0.25, 0.25))
    for field, number in itertools.product(MEASURED, (float("nan"), float("inf"))):
        spoilt: Any = np.array(getattr(observation, field))
        spoilt.flat[0] = number
        changed: dict[str, Any] = {field: spoilt}
        assert_changes_nothing(policy, replace(observation, **changed))


def test_a_step_of_which_nothing_is_known_changes_nothing(config: PolicyConfig) -> None:
    context = make_context()
    run = SimulatedRun(context=context)
    policy = made(config, context)
    run.play(policy, range(12))
    observation = run.observation(12, (0.5, 0.25, 0.25))
    for domain in range(3):
        observation = without(observation, domain)
    assert_changes_nothing(policy, observation)


def test_a_domain_that_never_comes_harms_nothing(config: PolicyConfig) -> None:
    context = make_context()
    run = SimulatedRun(context=context)
    policy = made(config, context)
    for step in range(15):
        policy.observe(without(run.observation(step, (0.5, 0.25, 0.25)), 1))
        assert_is_mixture(policy.propose(Step(step + 2)), 3)


def test_a_policy_that_learns_asks_for_losses(config: PolicyConfig) -> None:
    needs = made(config, make_context()).needs
    assert (Statistic.LOSS in needs) == (config.name not in BLIND)
    by_alignment = ("acodm", "shuffled_reward", "align_eg", "doge", "pike")
    assert (Statistic.ALIGNMENT in needs) == (config.name in by_alignment)
    assert (Statistic.EXCESS in needs) == (config.name == "doremi")
    assert (Statistic.GRADIENT_NOISE in needs) == (config.name == "pike")
    assert (Statistic.VALIDATION in needs) == (config.name in ("aioli", "skillit"))
    assert bool(validation_of(config, make_context())) == (Statistic.VALIDATION in needs)


def test_a_state_of_another_policy_is_refused(config: PolicyConfig) -> None:
    context = make_context()
    policy = made(config, context)
    for other in POLICIES.values():
        state = made(other, context).state()
        if other == config:
            policy.restore(state)
            continue
        with pytest.raises(ValueError, match="the state is of a policy with"):
            policy.restore(state)


def test_a_turn_takes_a_small_part_of_the_time_budget(config: PolicyConfig) -> None:
    # The guard's is 2 s; with as many domains as a run may well have.
    context = make_context(30, global_sequences=400)
    policy = made(config, context)
    run = SimulatedRun(context=context)
    spent = []
    for step in range(20):
        observation = run.observation(step, [1 / 30] * 30)
        begun = time.process_time()
        policy.observe(observation)
        policy.propose(Step(step + 2))
        spent.append(time.process_time() - begun)
    assert max(spent) < 0.5


def test_a_state_of_other_domains_is_refused(config: PolicyConfig) -> None:
    state = made(config, make_context(4)).state()
    with pytest.raises(ValueError, match=r"domains .*domain-3.*, the run has"):
        made(config, make_context()).restore(state)


def test_a_state_without_a_header_is_refused(config: PolicyConfig) -> None:
    policy = made(config, make_context())
    state = policy.state()
    with pytest.raises(ValueError, match="no header"):
        policy.restore(replace(state, values={}))


def test_a_returned_state_does_not_change_later(config: PolicyConfig) -> None:
    context = make_context()
    run = SimulatedRun(context=context)
    policy = made(config, context)
    run.play(policy, range(6))
    state = policy.state()
    held = {name: array.copy() for name, array in state.arrays.items()}
    run.play(policy, range(6, 12))
    for name, array in held.items():
        assert np.array_equal(state.arrays[name], array, equal_nan=True), name
