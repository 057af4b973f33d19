"""What a comparison may say, and what may change in one that has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.compare.spec import keep_spec, load_spec, resolve_references
from protos.errors import ConfigError
from tests.fakes_compare import small_spec

ARMS: dict[str, Any] = {
    "replay": {"name": "replay_mean", "from": {"mean_file_of": "acodm"}},
    "uniform": {"name": "uniform"},
    "acodm": {"policy": {"name": "acodm"}, "model": "300k"},
}


def test_seeds_come_one_after_the_other_and_an_arm_after_what_it_refers_to() -> None:
    spec = small_spec(Path("corpus"), ARMS, seeds=[4, 2])
    order = ["acodm", "replay", "uniform"]
    assert spec.trials() == [(arm, 4) for arm in order] + [(arm, 2) for arm in order]
    assert spec.model_of("acodm") == "300k"
    assert spec.model_of("uniform") == "nano"


def test_references_are_replaced_wherever_they_stand() -> None:
    settings = {"a": [{"mean_of": "x"}], "b": {"c": {"policy_of": "y"}, "d": 1}}
    found = {("mean_of", "x"): {"code": 1.0}, ("policy_of", "y"): "file"}
    assert resolve_references(settings, found) == {
        "a": [{"code": 1.0}],
        "b": {"c": "file", "d": 1},
    }


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({"a": {"name": "static", "mixture": {"mean_of": "b"}}}, "mean_of: b, but the arms are a"),
        (
            {
                "a": {"name": "static", "mixture": {"mean_of": "b"}},
                "b": {"name": "static", "mixture": {"mean_of": "a"}},
            },
            "in a circle: a -> b",
        ),
        ({"a/b": {"name": "uniform"}}, "an arm's label"),
        ({"a": {"policy": {"gamma": 0}}}, "a policy needs a name"),
        ({}, "at least one entry"),
    ],
)
def test_impossible_arms_are_refused(arms: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small_spec(Path("corpus"), arms)


def test_arms_and_seeds_may_be_added_and_nothing_else_changed(tmp_path: Path) -> None:
    keep_spec(small_spec(Path("corpus"), ARMS), tmp_path)
    more = {**ARMS, "odm": {"name": "odm"}}
    wider = small_spec(Path("corpus"), more, seeds=[0, 1])
    keep_spec(wider, tmp_path)
    assert load_spec(tmp_path / "compare.yaml") == wider
    with pytest.raises(ConfigError, match="steps = 12, now it is 13"):
        keep_spec(small_spec(Path("corpus"), more, steps=13), tmp_path)
    changed = {**ARMS, "uniform": {"name": "natural"}}
    with pytest.raises(ConfigError, match="has arms.uniform"):
        keep_spec(small_spec(Path("corpus"), changed), tmp_path)
