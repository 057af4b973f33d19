"""A run whose policy a run before it has learned, through the controller's own loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.app import bring_up
from controller.history import read_history
from controller.policy import artefact
from controller.prepare import prepare
from protos.errors import ConfigError
from protos.types import Step
from tests.fakes_controller import ACODM, Bench, bench, make_beat, small_run

GUARD = {"max_change": 1.0, "min_share": 0.0}


def play(made: Bench, steps: range, **more: Any) -> str:
    """Report steps to a run of one rank; return where the policy was saved after them."""

    async def go() -> str:
        await made.join_all(1)
        for step in steps:
            await made.report_step(step, **more)
        return await made.service.snapshot_policy()

    return asyncio.run(go())


@pytest.fixture
def proxy(tmp_path: Path) -> Path:
    """What `headrace snapshot` writes of a short run."""
    config = small_run(tmp_path / "small", policy={**ACODM, "warmup_steps": 4}, guard=GUARD)
    with bench(config) as made:
        return Path(play(made, range(12)))


def by_proxy(folder: Path, path: Path, **proxy: Any) -> Any:
    policy = {"name": "acodm", "proxy": {"artefact": str(path), **proxy}}
    return small_run(folder, run="large", policy=policy, guard=GUARD)


def test_a_snapshot_says_of_which_run_it_is_and_what_bound_it(proxy: Path) -> None:
    origin = artefact.read(proxy).origin
    assert origin["run"] == "small"
    assert origin["planned_steps"] == 40
    assert origin["steps"] == 12
    assert origin["guard"]["max_change"] == 1.0


def test_a_frozen_run_measures_no_gradients_and_acts_from_the_first_step(
    tmp_path: Path, proxy: Path
) -> None:
    config = by_proxy(tmp_path / "large", proxy)
    learned = artefact.load(proxy).arrays["agent.actor.weights"]
    with bench(config) as made:
        assert made.spec.probe is not None
        assert made.spec.probe.mode == "norms"
        first = made.plans[0].mixture
        assert first.shares == pytest.approx(prepare(config).policy.propose(Step(0)))
        path = play(made, range(6), alignment_part=None, alignment_share=0.0)
        assert len({plan.mixture for plan in made.plans}) > 3  # it answers to what it sees
        assert made.runner.phase == "frozen"
    saved = artefact.load(Path(path))
    assert "agent.actor.weights" not in saved.arrays
    assert np.array_equal(artefact.load(proxy).arrays["agent.actor.weights"], learned)


def test_a_learning_run_measures_gradients_and_changes_what_it_took_over(
    tmp_path: Path, proxy: Path
) -> None:
    config = by_proxy(tmp_path / "large", proxy, mode="learning")
    with bench(config) as made:
        assert made.spec.probe is not None
        assert made.spec.probe.mode == "sketch"
        path = play(made, range(12))
        assert made.runner.phase == "acting"
    before, after = (artefact.load(at).arrays["agent.actor.weights"] for at in (proxy, Path(path)))
    assert before.shape == after.shape
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("mode", ["frozen", "learning"])
def test_a_controller_that_starts_again_goes_on_with_the_same_mixtures(
    tmp_path: Path, proxy: Path, mode: str
) -> None:
    whole = by_proxy(tmp_path / "whole", proxy, mode=mode)
    with bench(whole) as made:
        play(made, range(12))
        wanted = [plan.mixture for plan in made.plans]
    halved = by_proxy(tmp_path / "halved", proxy, mode=mode)
    with bench(halved) as made:
        play(made, range(7))
    with bench(halved) as made:
        history = read_history(made.ledger, made.spec)
        asyncio.run(bring_up(made.runner, history, made.ledger, made.ledger_thread))

        async def go() -> None:
            for step in range(7, 12):
                await made.report_step(step)

        made.workers.told_plans("worker-0")
        for _ in range(2):
            made.workers.beat(make_beat())
        asyncio.run(go())
        assert [plan.mixture for plan in made.plans] == wanted


def test_a_run_of_other_domains_is_refused_before_it_begins(tmp_path: Path, proxy: Path) -> None:
    config = by_proxy(tmp_path / "large", proxy, domains={"web": "code"})
    with pytest.raises(ConfigError, match=r"more than one domain of this run is its code"):
        prepare(config)


def test_an_artefact_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no policy state at .*nowhere"):
        prepare(by_proxy(tmp_path / "large", tmp_path / "nowhere"))
