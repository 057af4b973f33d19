"""A policy learned in one run, acting in another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controller.policy import artefact
from controller.policy.acodm.frozen import FrozenAcodmPolicy
from controller.policy.acodm.policy import AcodmPolicy
from controller.policy.base import Policy, PolicyContext, PolicyState, Statistic
from controller.policy.config import AcodmConfig, OdmConfig, ProxyConfig
from controller.policy.registry import initial_mixture, make_policy
from protos.errors import ConfigError
from protos.types import Step
from tests.fakes_policy import SimulatedRun, make_context
from tests.laws import assert_changes_nothing, assert_is_mixture, assert_resumes_exactly

GOOD = (1, 3)
STEPS = 200
LEARNER = AcodmConfig(initial="uniform", width=32, depth=2, batch_size=16, actor_lr=1e-3)
CONTEXT = make_context(5, num_steps=STEPS)
CONTEXT_SHARES = (0.2,) * 5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learned that domains 1 and 3 help the others."""
    policy = AcodmPolicy(LEARNER, CONTEXT)
    SimulatedRun(context=CONTEXT, good=GOOD).play(policy, range(STEPS))
    path = tmp_path_factory.mktemp("proxy") / "policy.safetensors"
    artefact.save(policy.state(), path, origin={"run": "small", "steps": STEPS})
    return path


def configured(path: Path, *, mode: str = "frozen", **settings: Any) -> AcodmConfig:
    domains = settings.pop("domains", None)
    proxy = {"artefact": path, "mode": mode, "domains": domains}
    return AcodmConfig.model_validate({**settings, "proxy": proxy})


def larger(*, domains: tuple[str, ...] = CONTEXT.domains) -> PolicyContext:
    return replace(CONTEXT, domains=domains, num_steps=50, global_sequences=256, seed=9)


def good_share(shares: Any, good: tuple[int, ...] = GOOD) -> float:
    return float(np.asarray(shares)[list(good)].sum())


def without_gradients(context: PolicyContext, steps: range, policy: Policy) -> list[Any]:
    run = SimulatedRun(context=context, good=(0,), probe_every=10**6)
    return run.play(policy, steps)


def test_a_frozen_policy_needs_no_gradients_and_acts_from_the_first_step(proxy: Path) -> None:
    policy = make_policy(configured(proxy), larger())
    assert isinstance(policy, FrozenAcodmPolicy)
    assert policy.needs == {Statistic.LOSS, Statistic.NORMS}
    assert policy.phase == "frozen"
    assert good_share(policy.propose(Step(0))) > 0.52
    assert initial_mixture(configured(proxy), larger()) == tuple(policy.propose(Step(0)))
    # Steps 0 and 10**6, ... would have an alignment.
    for shares in without_gradients(larger(), range(1, 20), policy):
        assert_is_mixture(shares, 5)
        assert good_share(shares) > 0.52


def test_a_frozen_policy_says_what_one_that_may_learn_says_before_it_does(proxy: Path) -> None:
    frozen = make_policy(configured(proxy), larger())
    waiting = configured(proxy, mode="learning", warmup_steps=100, exploration_noise=0.0)
    learner = make_policy(waiting, larger())
    run = SimulatedRun(context=larger(), good=GOOD)
    for step in range(6):
        assert frozen.propose(Step(step)) == pytest.approx(learner.propose(Step(step)), abs=0.02)
        observation = run.observation(step, CONTEXT_SHARES)
        learner.observe(observation)
        frozen.observe(observation)


def test_a_frozen_policy_sees_the_run(proxy: Path) -> None:
    policy = make_policy(configured(proxy), larger())
    run = SimulatedRun(context=larger())
    policy.observe(run.observation(1, CONTEXT_SHARES))
    one = policy.propose(Step(3))
    observation = run.observation(2, CONTEXT_SHARES)
    policy.observe(replace(observation, loss_sum=observation.loss_sum * [3, 1, 1, 1, 0.3]))
    assert policy.propose(Step(4)) != one


def test_a_frozen_policy_without_places_for_norms_needs_losses_alone(tmp_path: Path) -> None:
    config = LEARNER.model_copy(update={"norm_layers": 0})
    policy = AcodmPolicy(config, CONTEXT)
    SimulatedRun(context=CONTEXT, num_norms=0).play(policy, range(30))
    artefact.save(policy.state(), tmp_path / "a")
    assert make_policy(configured(tmp_path / "a"), larger()).needs == {Statistic.LOSS}


def test_a_learning_policy_acts_at_once_and_learns_on(proxy: Path) -> None:
    policy = make_policy(configured(proxy, mode="learning", warmup_steps=20), CONTEXT)
    assert policy.phase == "acting"
    assert Statistic.ALIGNMENT in policy.needs
    assert good_share(policy.propose(Step(0))) > 0.52
    # Other domains help in this run: it must find out.
    run = SimulatedRun(context=CONTEXT, good=(0, 2))
    first = run.play(policy, range(20))
    assert good_share(np.mean(first, axis=0)) > 0.52
    later = run.play(policy, range(20, STEPS))
    assert good_share(later[-1], (0, 2)) > good_share(first[-1], (0, 2)) + 0.1


def test_a_learning_policy_leaves_the_networks_alone_until_it_has_something_to_learn_from(
    proxy: Path,
) -> None:
    policy = make_policy(configured(proxy, mode="learning", warmup_steps=20), CONTEXT)
    held = artefact.load(proxy).arrays["agent.actor.weights"]
    SimulatedRun(context=CONTEXT).play(policy, range(20))
    assert np.array_equal(policy.state().arrays["agent.actor.weights"], held)
    SimulatedRun(context=CONTEXT).play(policy, range(20, 24))
    assert not np.array_equal(policy.state().arrays["agent.actor.weights"], held)


@pytest.mark.parametrize("mode", ["frozen", "learning"])
def test_domains_in_another_order_are_known_by_their_names(proxy: Path, mode: str) -> None:
    turned = tuple(reversed(CONTEXT.domains))
    straight = make_policy(configured(proxy, mode=mode), larger())
    other = make_policy(configured(proxy, mode=mode), larger(domains=turned))
    assert other.propose(Step(0)) == tuple(reversed(straight.propose(Step(0))))
    run = SimulatedRun(context=larger(), good=GOOD)
    for step in range(12):
        observation = run.observation(step, CONTEXT_SHARES)
        straight.observe(observation)
        other.observe(reversed_domains(observation))
    assert other.propose(Step(12)) == tuple(reversed(straight.propose(Step(12))))


def reversed_domains(observation: Any) -> Any:
    return replace(
        observation,
        planned=observation.planned[::-1],
        sequences=observation.sequences[::-1],
        tokens=observation.tokens[::-1],
        loss_sum=observation.loss_sum[::-1],
        alignment=observation.alignment[::-1, ::-1],
    )


def test_domains_of_other_names_are_mapped_on_request(proxy: Path) -> None:
    names = ("domain-0", "prose", "domain-2", "domain-3", "domain-1")
    mapping = {"prose": "domain-1", "domain-1": "domain-4"}
    policy = make_policy(configured(proxy, domains=mapping), larger(domains=names))
    same = make_policy(configured(proxy), larger())
    assert policy.propose(Step(0)) == same.propose(Step(0))


@pytest.mark.parametrize(
    ("names", "mapping", "sentence"),
    [
        (
            ("domain-0", "prose", "domain-2", "domain-3", "wiki"),
            None,
            r"only in the artefact: domain-1, domain-4; only in this run: prose, wiki",
        ),
        (CONTEXT.domains[:4], None, r"only in the artefact: domain-4\)"),
        ((*CONTEXT.domains, "wiki"), None, r"only in this run: wiki\)"),
        (
            ("domain-0", "prose", "domain-2", "domain-3", "domain-4"),
            {"prose": "domain-2"},
            r"only in the artefact: domain-1; more than one domain of this run is its domain-2",
        ),
        (CONTEXT.domains, {"prose": "domain-1"}, r"names 'prose', but the run has domain-0"),
        (CONTEXT.domains, {"domain-1": "prose"}, r"calls 'domain-1' 'prose' in the artefact"),
    ],
)
def test_other_domains_are_refused_with_the_difference(
    proxy: Path, names: tuple[str, ...], mapping: dict[str, str] | None, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_policy(configured(proxy, domains=mapping), larger(domains=names))


@pytest.mark.parametrize("mode", ["frozen", "learning"])
def test_the_artefacts_settings_hold_where_the_run_file_says_nothing(
    proxy: Path, mode: str
) -> None:
    with pytest.raises(ConfigError, match=r"policy.width is 64, but .* learned with 32; leave"):
        make_policy(configured(proxy, mode=mode, width=64), larger())
    policy = make_policy(configured(proxy, mode=mode, width=32, floor=0.1), larger())
    assert min(policy.propose(Step(0))) >= 0.1 - 1e-6


def test_a_mixture_of_the_artefact_is_meant_by_this_runs_names(tmp_path: Path) -> None:
    config = LEARNER.model_copy(update={"initial": {"domain-0": 3.0, "domain-4": 1.0}})
    policy = AcodmPolicy(config, CONTEXT)
    SimulatedRun(context=CONTEXT).play(policy, range(30))
    artefact.save(policy.state(), tmp_path / "a")
    names = ("prose", "domain-1", "domain-2", "domain-3", "domain-4")
    chosen = configured(tmp_path / "a", mode="learning", domains={"prose": "domain-0"})
    mapped = make_policy(chosen, larger(domains=names))
    assert isinstance(mapped, AcodmPolicy)
    settings = mapped.state().values["header"]["settings"]
    assert settings["initial"] == {"prose": 3.0, "domain-4": 1.0}


def test_what_was_learned_in_a_proxy_run_goes_on_to_a_third(proxy: Path, tmp_path: Path) -> None:
    turned = tuple(reversed(CONTEXT.domains))
    second = make_policy(configured(proxy, mode="learning"), larger(domains=turned))
    SimulatedRun(context=larger(domains=turned), good=GOOD).play(second, range(3))
    artefact.save(second.state(), tmp_path / "second")
    third = make_policy(configured(tmp_path / "second"), larger())
    first = make_policy(configured(proxy), larger())
    assert third.propose(Step(0)) == pytest.approx(first.propose(Step(0)), abs=0.02)


def test_a_policy_that_has_not_acted_yet_is_refused(tmp_path: Path) -> None:
    artefact.save(AcodmPolicy(LEARNER, CONTEXT).state(), tmp_path / "a")
    with pytest.raises(ConfigError, match="still in its warm-up"):
        make_policy(configured(tmp_path / "a"), larger())


def test_what_learns_nothing_for_others_is_refused(proxy: Path, tmp_path: Path) -> None:
    for index, state in enumerate(
        (
            make_policy(OdmConfig(), CONTEXT).state(),
            make_policy(configured(proxy), CONTEXT).state(),
            PolicyState(),
        )
    ):
        artefact.save(state, tmp_path / str(index))
        with pytest.raises(ConfigError, match="learns nothing for others"):
            make_policy(configured(tmp_path / str(index)), larger())


@pytest.mark.parametrize("mode", ["frozen", "learning"])
def test_saved_and_restored_anywhere_it_goes_on_as_if_never_stopped(
    proxy: Path, mode: str, tmp_path: Path
) -> None:
    config = configured(proxy, mode=mode, warmup_steps=4)
    run = SimulatedRun(context=larger())
    observations = [run.observation(step, CONTEXT_SHARES) for step in range(12)]
    assert_resumes_exactly(
        lambda: make_policy(config, larger()), observations, tmp_path / "policy.safetensors"
    )


@pytest.mark.parametrize("mode", ["frozen", "learning"])
def test_a_state_of_a_run_with_another_artefact_is_refused(
    proxy: Path, mode: str, tmp_path: Path
) -> None:
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    moved.write_bytes(proxy.read_bytes())
    artefact.save(artefact.load(proxy), changed, origin={"run": "another"})
    state = make_policy(configured(proxy, mode=mode), larger()).state()
    make_policy(configured(moved, mode=mode), larger()).restore(state)
    with pytest.raises(ValueError, match="the state is of a policy with proxy"):
        make_policy(configured(changed, mode=mode), larger()).restore(state)


@pytest.mark.parametrize("mode", ["frozen", "learning"])
def test_a_number_that_is_not_finite_changes_nothing(proxy: Path, mode: str) -> None:
    policy = make_policy(configured(proxy, mode=mode), larger())
    run = SimulatedRun(context=larger())
    run.play(policy, range(3))
    observation = run.observation(3, CONTEXT_SHARES)
    assert_changes_nothing(policy, replace(observation, loss_sum=observation.loss_sum * np.nan))


def test_the_keys_say_what_they_want() -> None:
    with pytest.raises(ValueError, match="artefact"):
        ProxyConfig.model_validate({"mode": "frozen"})
    with pytest.raises(ValueError, match="'frozen' or 'learning'"):
        ProxyConfig.model_validate({"artefact": "a", "mode": "thawed"})
