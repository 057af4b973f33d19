"""AC-ODM in a simulated run whose gradients favour some domains: it must find them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from controller.policy.acodm.policy import AcodmPolicy
from controller.policy.config import AcodmConfig
from protos.types import Step
from tests.fakes_policy import SimulatedRun, make_context
from tests.laws import assert_same_state

GOOD = (1, 3)
STEPS = 160
UNIFORM = 2 / 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def share_of_good(config: AcodmConfig, *, seed: int, good: tuple[int, ...] = GOOD) -> float:
    """Play a run; return the mean share of domains 1 and 3 in its last steps."""
    context = make_context(5, num_steps=STEPS, seed=seed)
    run = SimulatedRun(context=context, good=good)
    proposals = run.play(AcodmPolicy(config, context), range(STEPS))
    return float(np.array(proposals[-20:])[:, GOOD].sum(axis=1).mean())


BASE = AcodmConfig(initial="uniform", width=32, depth=2, batch_size=16)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reward": "cosine"},
        {"reward": "paper", "importance": "paper"},
        {"normalise": "across_domains"},
        {"update_every": 2, "updates_per_step": 2},
        {"warmup_acting": "odm"},
        {"critic": "scalar", "anchor_weight": 0.0, "actor_lr": 3e-4},
    ],
    ids=str,
)
def test_domains_whose_gradients_help_the_others_get_more(settings: dict[str, object]) -> None:
    config = BASE.model_copy(update=settings)
    assert share_of_good(config, seed=0) > UNIFORM + 0.12


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_with_any_seed(seed: int) -> None:
    assert share_of_good(BASE, seed=seed) > UNIFORM + 0.12


def test_without_a_difference_it_stays_near_the_initial_mixture() -> None:
    assert share_of_good(BASE, seed=0, good=()) == pytest.approx(UNIFORM, abs=0.12)


def test_it_follows_when_other_domains_begin_to_help() -> None:
    context = make_context(5, num_steps=3 * STEPS)
    policy = AcodmPolicy(BASE.model_copy(update={"replay_capacity": 100}), context)
    SimulatedRun(context=context, good=GOOD).play(policy, range(STEPS))
    before = np.array(policy.propose(Step(STEPS)))[list(GOOD)].sum()
    SimulatedRun(context=context, good=(0, 2)).play(policy, range(STEPS, 3 * STEPS))
    after = np.array(policy.propose(Step(3 * STEPS)))[list(GOOD)].sum()
    assert before > UNIFORM + 0.1
    assert after < UNIFORM - 0.1


def test_the_warm_up_lasts_as_long_as_set_and_stays_around_the_initial_mixture() -> None:
    context = make_context(3)
    policy = AcodmPolicy(BASE.model_copy(update={"warmup_steps": 20, "floor": 0.0}), context)
    run = SimulatedRun(context=context)
    phases, shares = [], []
    for step in range(25):
        policy.observe(run.observation(step, policy.propose(Step(step))))
        phases.append(policy.phase)
        shares.append(policy.propose(Step(step + 1)))
    assert phases == ["warm-up"] * 20 + ["acting"] * 5
    noise = np.array(shares[:20]) - 1 / 3
    assert np.abs(noise).max() < 0.1
    assert noise.std() > 0.005


def test_steps_without_an_alignment_leave_no_transition_but_count() -> None:
    context = make_context(3)
    policy = AcodmPolicy(BASE, context)
    run = SimulatedRun(context=context, probe_every=4)
    run.play(policy, range(9))
    state = policy.state()
    assert state.arrays["replay.states"].shape[0] == 2  # of steps 4 and 8; step 0 has no before
    assert state.arrays["tracker.tokens"].sum() == 9 * 64 * 100
    assert state.values["num_observed"] == 9


def test_the_replay_holds_the_mixture_that_was_carried_out() -> None:
    context = make_context(3)
    policy = AcodmPolicy(BASE, context)
    run = SimulatedRun(context=context)
    policy.observe(run.observation(0, (0.2, 0.2, 0.6)))
    second = run.observation(1, (0.2, 0.2, 0.6))
    sequences = np.array([60, 3, 1])
    policy.observe(replace(second, sequences=sequences))
    held = policy.state().arrays["replay.mixtures"][0]
    assert held == pytest.approx(sequences / 64, rel=1e-6)


def test_it_makes_no_difference_whether_it_learns_at_once_or_before_the_next_step() -> None:
    context = make_context(3)
    at_once, later = (AcodmPolicy(BASE, context) for _ in range(2))
    run = SimulatedRun(context=context)
    for step in range(24):
        for policy in (at_once, later):
            policy.observe(run.observation(step, (0.2, 0.3, 0.5)))
        assert at_once.propose(Step(step + 2)) == later.propose(Step(step + 2))
        at_once.learn()
        at_once.learn()  # once is enough
    assert_same_state(at_once.state(), later.state())


def test_a_mixture_does_not_wait_for_what_the_step_teaches() -> None:
    context = make_context(3)
    policy = AcodmPolicy(BASE, context)
    run = SimulatedRun(context=context)
    run.play(policy, range(20))
    before = policy.state().arrays["agent.critic.weights"]
    policy.observe(run.observation(20, (0.2, 0.3, 0.5)))
    assert np.array_equal(policy._agent.arrays()["critic.weights"], before)
    policy.learn()
    assert not np.array_equal(policy._agent.arrays()["critic.weights"], before)


def test_what_is_learned_now_and_then_costs_that_much_less() -> None:
    context = make_context(5, num_steps=STEPS)
    run = SimulatedRun(context=context)
    policy = AcodmPolicy(BASE.model_copy(update={"update_every": 4, "warmup_steps": 20}), context)
    run.play(policy, range(60))
    changed = []
    for step in range(60, 72):
        before = policy.state().arrays["agent.critic.weights"]
        run.play(policy, range(step, step + 1))
        changed.append(bool((policy.state().arrays["agent.critic.weights"] != before).any()))
    assert changed == [False, False, False, True] * 3
