from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from controller.policy.config import AcodmConfig, PolicyConfig, ScheduleConfig, SchedulePoint
from controller.policy.mixtures import resolve
from controller.policy.registry import initial_mixture, make_policy
from protos.errors import ConfigError, UnknownDomain
from protos.types import Step
from tests.fakes_policy import make_context

READER: TypeAdapter[PolicyConfig] = TypeAdapter(PolicyConfig)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "static", "mixture": {"domain-0": 0.5, "domain-1": 0.5}},
        {"name": "natural"},
        {"name": "uniform"},
        {"name": "schedule", "points": [{"step": 0, "mixture": "uniform"}]},
        {"name": "odm", "initial": "natural"},
        {"name": "odm_paper"},
        {"name": "ado", "prior": "uniform", "smoothing_window": 7},
        {"name": "doremi"},
        {"name": "doge", "own_term": False},
        {"name": "skillit", "graph": "graph.json"},
        {"name": "aioli", "trial_rounds": 1},
        {"name": "pike", "initial": {"domain-0": 1}},
        {"name": "align_eg", "reward": "cosine", "anchor_weight": 0},
        {"name": "random_actor", "floor": 0.01},
        {"name": "shuffled_reward", "width": 128},
        {"name": "replay_mean", "from": "runs/other"},
        {"name": "acodm", "initial": {"domain-0": 1}, "width": 128},
    ],
)
def test_the_name_chooses_the_policy(settings: dict[str, Any]) -> None:
    config = READER.validate_python(settings)
    assert config.name == settings["name"]
    assert READER.validate_python(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "magic"}, "magic"),
        ({"name": "uniform", "mixture": {}}, "Extra inputs are not permitted"),
        ({"name": "static", "mixture": {}}, "at least 1 item"),
        ({"name": "static", "mixture": {"a": -1}}, "share of domain 'a' must be finite and not"),
        ({"name": "static", "mixture": {"a": 0}}, "at least one share must be above 0"),
        ({"name": "odm", "initial": {"a": float("nan")}}, "share of domain 'a' must be finite"),
        ({"name": "schedule", "points": []}, "at least 1 item"),
        (
            {"name": "schedule", "points": [{"step": 3, "mixture": "uniform"}]},
            "the first of points must have step 0, got step 3",
        ),
        (
            {"name": "schedule", "points": [{"step": 0, "mixture": "uniform"}] * 2},
            "the steps of points must grow",
        ),
        ({"name": "acodm", "gamma": 1.0}, "less than 1"),
        (
            {"name": "acodm", "warmup_acting": "odm", "warmup_noise": 0.1},
            "warmup_noise has no effect",
        ),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        READER.validate_python(settings)


def test_shares_are_scaled_and_a_domain_left_out_gets_none() -> None:
    assert resolve({"domain-2": 3, "domain-0": 1}, make_context()) == (0.25, 0.0, 0.75)


def test_natural_goes_by_size() -> None:
    assert resolve("natural", make_context()) == pytest.approx((1 / 6, 2 / 6, 3 / 6))


def test_natural_without_sizes_is_refused() -> None:
    context = make_context()
    object.__setattr__(context, "domain_sizes", (0.0, 0.0, 0.0))
    with pytest.raises(ConfigError, match="size of every domain"):
        resolve("natural", context)


def test_a_mixture_of_unknown_domains_names_them_and_the_runs() -> None:
    with pytest.raises(UnknownDomain, match=r"domain 'books'; the run has domain-0, domain-1"):
        make_policy(
            READER.validate_python({"name": "static", "mixture": {"books": 1}}), make_context(2)
        )


def test_a_schedule_holds_each_mixture_until_the_next_point() -> None:
    config = ScheduleConfig(
        points=(
            SchedulePoint(step=0, mixture={"domain-0": 1}),
            SchedulePoint(step=10, mixture={"domain-1": 1}),
            SchedulePoint(step=20, mixture="uniform"),
        )
    )
    policy = make_policy(config, make_context(2))
    first = {step: tuple(policy.propose(Step(step))) for step in (0, 9, 10, 19, 20, 1000)}
    assert first == {
        0: (1, 0),
        9: (1, 0),
        10: (0, 1),
        19: (0, 1),
        20: (0.5, 0.5),
        1000: (0.5, 0.5),
    }


def test_a_floor_that_leaves_nothing_to_decide_is_refused() -> None:
    config = AcodmConfig(floor=0.05)
    for ask in (make_policy, initial_mixture):
        with pytest.raises(ConfigError, match=r"policy.floor 0.05 for each of 20 domains"):
            ask(config, make_context(20))
