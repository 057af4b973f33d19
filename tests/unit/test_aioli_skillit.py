"""`aioli` and `skillit` against small systems whose laws are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy.aioli import AioliPolicy, normalised, timetable
from controller.policy.base import Policy
from controller.policy.registry import validation_of
from controller.policy.settings_of_rivals import AioliConfig, SkillitConfig
from controller.policy.skillit import SkillitPolicy, by_graph
from controller.policy.trials import Timetable
from protos.errors import ConfigError
from protos.types import Step
from tests.fakes_policy import make_context

Floats = NDArray[np.float64]


class LinearWorld:
    """Each step lowers the losses by `law` x the shares: what Aioli's law says, exactly."""

    def __init__(self, policy: Policy, law: Floats, *, relative: bool = False) -> None:
        self.policy = policy
        self.law = law
        self.relative = relative
        self.losses = np.full(len(law), 5.0)
        self.sealed = [policy.propose(Step(0)), policy.propose(Step(1))]
        self.step = 0

    def train(self, num_steps: int, *, silent: tuple[int, ...] = ()) -> None:
        for _ in range(num_steps):
            shares = np.array(self.sealed.pop(0))
            drop = self.law @ shares
            self.losses = self.losses * (1 - drop) if self.relative else self.losses - drop
            evaluated = None if self.step in silent else self.losses.copy()
            try:
                self.policy.observe(self.seen(shares, evaluated))
                self.sealed.append(self.policy.propose(Step(self.step + 2)))
            except ConfigError:
                self.sealed.append(self.sealed[-1])
            self.step += 1

    def seen(self, shares: Floats, evaluated: Floats | None) -> StepObservation:
        tokens = np.full(len(shares), 1_000)
        return StepObservation(
            step=Step(self.step),
            num_steps=1_000,
            planned=shares,
            sequences=np.round(shares * 1_000_000).astype(np.int64),
            tokens=tokens,
            loss_sum=self.losses * tokens,
            alignment=None,
            weight_norms=np.zeros(0),
            update_norms=np.zeros(0),
            validation_loss=evaluated,
        )


def test_a_timetable_has_a_phase_before_the_trials_and_the_rest_after_them() -> None:
    table = Timetable(phase_steps=3, num_trials=2, round_steps=20)
    trials = [table.trial(step) for step in range(20)]
    assert trials == [None] * 3 + [0] * 3 + [1] * 3 + [None] * 11
    assert [table.trial(step) for step in range(20, 40)] == trials
    assert [step for step in range(40) if table.validation.due(step)] == [2, 5, 8, 22, 25, 28]
    assert [table.num_ended(step) for step in (2, 5, 8)] == [0, 1, 2]
    assert table.round(19) == 0
    assert table.round(20) == 1


def test_aioli_solves_for_the_law_by_hand_for_two_domains() -> None:
    config = AioliConfig(
        update_steps=20, trial_steps=2, trial_rounds=1, focus=0.75, law_smoothing=0.25
    )
    policy = AioliPolicy(config, make_context(2))
    law = np.array([[0.03, 0.01], [0.02, 0.04]])
    world = LinearWorld(policy, law)
    world.train(6)
    # D[k] = 2 steps x P law[k], so solving gives twice the law; normalised it is the law / 0.1.
    assert policy.phase == "acting"
    weights = np.exp(law.sum(axis=0) / 0.1)
    assert policy.propose(Step(8)) == pytest.approx(weights / weights.sum(), rel=1e-6)

    # In the next round the law is another one, and a quarter of the old one stays.
    world.train(20 - 6)
    world.law = np.array([[0.04, 0.0], [0.0, 0.01]])
    world.train(6)
    mixed = 0.75 * np.array([0.8, 0.2]) + 0.25 * law.sum(axis=0) / 0.1
    weights = np.exp(mixed)
    assert policy.propose(Step(30)) == pytest.approx(weights / weights.sum(), rel=1e-4)


def test_aioli_tries_every_domain_as_often_in_an_order_of_each_round() -> None:
    config = AioliConfig(update_steps=40, trial_steps=1, trial_rounds=3, initial="natural")
    policy = AioliPolicy(config, make_context(4))
    orders = set()
    for round_start in (0, 40, 80):
        proposed = [policy.propose(Step(round_start + 1 + trial)) for trial in range(12)]
        favoured = [int(np.argmax(shares)) for shares in proposed]
        assert all(sorted(favoured[i : i + 4]) == [0, 1, 2, 3] for i in (0, 4, 8))
        assert all(max(shares) == 0.75 for shares in proposed)
        assert min(map(min, proposed)) == pytest.approx(0.25 / 3)
        orders.add(tuple(favoured))
        assert policy.propose(Step(round_start)) == pytest.approx((0.1, 0.2, 0.3, 0.4))
        assert policy.propose(Step(round_start + 13)) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert len(orders) == 3


def test_a_round_that_lacks_an_evaluation_changes_nothing_and_says_so() -> None:
    config = AioliConfig(update_steps=20, trial_steps=2, trial_rounds=1)
    policy = AioliPolicy(config, make_context(2))
    law = np.array([[0.03, 0.01], [0.02, 0.04]])
    world = LinearWorld(policy, law)
    world.train(20, silent=(3,))
    assert policy.phase == "measuring"
    assert policy.propose(Step(20)) == (0.5, 0.5)
    world.step = 21
    unseen = world.seen(np.array([0.5, 0.5]), None)
    with pytest.raises(ConfigError, match=r"held-out documents after step 21.*record_validation"):
        policy.observe(unseen)
    world.step = 20
    world.train(8)
    assert policy.phase == "acting"


def test_trials_that_a_guard_did_not_allow_leave_the_mixture_as_it_is() -> None:
    policy = AioliPolicy(AioliConfig(trial_steps=1, trial_rounds=1), make_context(2))
    world = LinearWorld(policy, np.array([[0.03, 0.01], [0.02, 0.04]]))
    for _ in range(5):
        world.sealed = [(0.5, 0.5), (0.5, 0.5)]
        world.train(1)
    assert policy.phase == "measuring"
    assert policy.propose(Step(9)) == (0.5, 0.5)


def test_a_law_is_made_positive_and_adds_up_to_one() -> None:
    assert normalised(np.array([[1.0, -1.0], [2.0, 0.0]])).tolist() == [
        [2 / 6, 0.0],
        [3 / 6, 1 / 6],
    ]
    assert normalised(np.array([[1.0, 3.0], [0.0, 0.0]])).tolist() == [[0.25, 0.75], [0, 0]]
    assert normalised(np.zeros((2, 2))).tolist() == [[0.25, 0.25], [0.25, 0.25]]


def test_a_round_is_long_enough_for_its_trials() -> None:
    context = make_context(22, num_steps=10_000)
    table = timetable(AioliConfig(), context)
    assert (table.trial_steps, table.round_steps) == (450, 900)
    assert timetable(AioliConfig(), make_context(3)).round_steps == 200
    with pytest.raises(ConfigError, match="update_steps 200 is too short to measure 22 domains"):
        timetable(AioliConfig(update_steps=200), context)


def test_evaluations_are_asked_for_where_they_are_needed() -> None:
    (aioli,) = validation_of(AioliConfig(), make_context(3))
    assert (aioli.every, aioli.span, aioli.period) == (10, 70, 200)
    learning, updates = validation_of(SkillitConfig(), make_context(3, num_steps=400))
    assert (learning.every, learning.span, learning.period) == (25, 100, 400)
    assert (updates.every, updates.period) == (4, 4)


GRAPH = {
    "domain-0": {"domain-0": 0.5, "domain-1": 0.2, "domain-2": 0.0},
    "domain-1": {"domain-0": 0.0, "domain-1": 0.4, "domain-2": 0.0},
    "domain-2": {"domain-0": 0.1, "domain-1": 0.1, "domain-2": 0.3},
}


def test_skillit_by_hand_with_a_graph_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(GRAPH))
    policy = SkillitPolicy(SkillitConfig(graph=path, update_steps=2), make_context())
    matrix = np.array([list(row.values()) for row in GRAPH.values()])
    first = np.exp(0.2 * matrix.sum(axis=1))
    assert policy.propose(Step(0)) == pytest.approx(first / first.sum())
    assert policy.phase == "acting"
    world = LinearWorld(policy, np.zeros((3, 3)))
    evaluations = []
    for step in range(8):
        world.losses = np.array([3.0, 2.0, 4.0]) - 0.1 * step
        if step % 2:
            evaluations.append(world.losses)
        world.train(1)
        if step % 2:
            weights = np.exp(0.2 * matrix @ np.sum(evaluations[-3:], axis=0))
            assert policy.propose(Step(step + 2)) == pytest.approx(weights / weights.sum())


def test_skillit_learns_its_graph_by_training_on_each_domain_alone() -> None:
    config = SkillitConfig(graph_steps=2, update_steps=50)
    policy = SkillitPolicy(config, make_context(3, num_steps=100))
    helps = np.array([[0.02, 0.0, 0.01], [0.01, 0.03, 0.0], [0.0, 0.0, 0.04]])
    world = LinearWorld(policy, helps, relative=True)
    proposed = [policy.propose(Step(step)) for step in range(8)]
    assert proposed[:2] == [(1 / 3, 1 / 3, 1 / 3)] * 2
    for domain in range(3):
        alone = tuple(float(domain == other) for other in range(3))
        assert proposed[2 + 2 * domain : 4 + 2 * domain] == [alone] * 2
    world.train(8)
    assert policy.phase == "acting"
    graph = 1 - (1 - helps.T) ** 2
    weights = by_graph(graph, np.ones(3), 0.2)
    assert policy.propose(Step(10)) == pytest.approx(weights, rel=1e-6)


def test_a_graph_of_which_an_evaluation_is_missing_is_not_used() -> None:
    config = SkillitConfig(graph_steps=2, update_steps=50)
    policy = SkillitPolicy(config, make_context(3, num_steps=100))
    LinearWorld(policy, np.eye(3) * 0.01).train(20, silent=(5,))
    assert policy.phase == "learning the graph"
    assert policy.propose(Step(30)) == (1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ("[]", "must be a JSON object that gives for each of the run's domains"),
        (json.dumps({**GRAPH, "books": {}}), "must be a JSON object"),
        (json.dumps({**GRAPH, "domain-2": {"domain-0": 1}}), "an object with a number for each"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(
    content: str | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "graph.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        SkillitPolicy(SkillitConfig(graph=path), make_context())


def test_a_run_too_short_for_a_graph_is_refused() -> None:
    settings: dict[str, Any] = {"graph_steps": 30}
    with pytest.raises(ConfigError, match=r"in 120 steps .* the run has 100: lower"):
        SkillitPolicy(SkillitConfig(**settings), make_context(3, num_steps=100))
