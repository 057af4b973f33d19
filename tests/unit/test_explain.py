"""`headrace explain`: every decision can be told from the ledger alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from controller.config import RunConfig
from controller.explanation import explain_step
from controller.policy.base import Policy
from deploy.commands import app
from protos.errors import ConfigError, LedgerError
from protos.types import Mixture, Step
from tests.fakes_controller import ODM, ScriptedPolicy, bench, make_report, resume_at, small_run


def _eager(step: Step) -> Sequence[float]:
    """Wants nearly everything for the first domain, and then something impossible."""
    return (0.98, 0.01, 0.01) if step < 6 else (float("nan"), 0.5, 0.5)


def _run(
    folder: Path, *, num_steps: int, policy: Policy | None = None, **changes: Any
) -> RunConfig:
    config = small_run(folder, **changes)

    async def steps() -> None:
        with bench(config, policy=policy) as made:
            await made.join_all(1)
            for step in range(num_steps):
                await made.report_step(step, validation_loss=np.array([1.0, 2.0, 3.0]))
            while made.shadows._backlog:
                await asyncio.sleep(0.001)
            await made.loop.flush()

    asyncio.run(steps())
    return config


def test_a_proposal_is_told_before_and_after_the_guard_with_the_reasons(tmp_path: Path) -> None:
    guard = {"min_share": 0.1, "max_share": 0.6, "max_change": 0.05}
    config = _run(tmp_path, num_steps=6, policy=ScriptedPolicy(_eager), guard=guard)
    told = explain_step(config.ledger_path, 1)
    assert told["policy"]["proposed_step"] == 3
    assert told["policy"]["proposal"] == {"web": 0.98, "code": 0.01, "books": 0.01}
    # Twice 0.05 from the 0.5, 0.3 and 0.2 that the run began with.
    assert told["decision"]["mixture"] == pytest.approx({"web": 0.6, "code": 0.2, "books": 0.2})
    changed = {"web": -0.38, "code": 0.19, "books": 0.19}
    assert told["decision"]["changed"] == pytest.approx(changed)
    assert any("max_change: held back web" in each for each in told["decision"]["reasons"])
    assert told["plan"]["first_step"] == 3
    assert told["plan"]["is_new"]
    assert told["plan"]["mixture"] == told["decision"]["mixture"]

    held = explain_step(config.ledger_path, 4)
    assert held["policy"]["proposal"]["web"] == "nan"
    assert "hold: the policy proposed shares that are not finite" in held["decision"]["reasons"][0]
    assert held["decision"]["mixture"] == explain_step(config.ledger_path, 3)["decision"]["mixture"]
    assert not held["plan"]["is_new"]


def test_what_was_observed_is_told_by_domain(tmp_path: Path) -> None:
    config = _run(tmp_path, num_steps=3, policy=ScriptedPolicy(_eager))
    told = explain_step(config.ledger_path, 2)["observation"]
    report = make_report(config_spec(config), step=2)
    for index, name in enumerate(("web", "code", "books")):
        row = told["domains"][name]
        assert row["sequences"] == report.sequences[index]
        assert row["loss"] == pytest.approx(report.loss_sum[index] / report.tokens[index])
        assert row["validation_loss"] == index + 1.0
        assert "excess_sum" not in row
    assert report.alignment_part is not None
    assert told["alignment"] == report.alignment_part.tolist()
    assert told["weight_norms"] == list(report.weight_norms)


def config_spec(config: RunConfig) -> Any:
    with bench(config) as made:
        return made.spec


def test_shadows_are_told_beside_the_policy(tmp_path: Path) -> None:
    config = _run(tmp_path, num_steps=8, shadows=[ODM, ODM])
    told = explain_step(config.ledger_path, 7)
    assert list(told["shadows"]) == ["odm", "odm-2"]
    assert told["shadows"]["odm"] == told["shadows"]["odm-2"]
    assert sum(told["shadows"]["odm"]["proposal"].values()) == pytest.approx(1)
    assert told["shadows"]["odm"]["fault"] == ""


def test_an_operators_override_is_the_reason(tmp_path: Path) -> None:
    config = small_run(tmp_path, policy=ODM)

    async def scenario() -> None:
        with bench(config) as made:
            await made.join_all(1)
            await made.report_step(0)
            await made.loop.steer(override=Mixture.from_shares((1, 1, 2)), frozen=False)
            await made.report_step(1)
            await made.loop.steer(override=None, frozen=True)
            await made.report_step(2)

    asyncio.run(scenario())
    told = explain_step(config.ledger_path, 1)
    assert told["decision"]["reasons"] == ["override: set by the operator"]
    assert told["decision"]["mixture"] == {"web": 0.25, "code": 0.25, "books": 0.5}
    assert told["policy"]["proposal"] is not None
    frozen = explain_step(config.ledger_path, 2)
    assert frozen["decision"]["reasons"] == ["hold: frozen by the operator"]
    assert frozen["plan"] == {**told["plan"], "is_new": False}


def test_of_a_step_that_was_trained_again_the_newest_line_is_told(tmp_path: Path) -> None:
    config = small_run(tmp_path, policy=ODM)

    async def scenario() -> None:
        with bench(config) as made:
            await made.join_all(1)
            for step in range(6):
                await made.report_step(step)
            await made.join_all(1, attempt="b", resume=resume_at(3, made.spec))
            await made.report_step(3)
            await made.loop.flush()

    asyncio.run(scenario())
    assert explain_step(config.ledger_path, 2)["generation"] == 1
    again = explain_step(config.ledger_path, 3)
    assert again["generation"] == 2
    assert again["policy"]["observed"] is False
    assert again["decision"]["reasons"] == ["recorded only"]
    with pytest.raises(ConfigError, match="knows nothing of step 5"):
        explain_step(config.ledger_path, 5)


def test_a_step_that_is_not_there_is_told(tmp_path: Path) -> None:
    config = _run(tmp_path, num_steps=2)
    with pytest.raises(ConfigError, match="knows nothing of step 9; the newest .* is 1"):
        explain_step(config.ledger_path, 9)
    with pytest.raises(LedgerError, match="there is no ledger"):
        explain_step(tmp_path / "nowhere.sqlite", 0)


@pytest.mark.parametrize("named", ["folder", "ledger"])
def test_the_command_prints_a_table_or_json(tmp_path: Path, named: str) -> None:
    config = _run(tmp_path, num_steps=8, policy=ScriptedPolicy(_eager), shadows=[ODM])
    out = str(config.out if named == "folder" else config.ledger_path)
    shown = CliRunner().invoke(app, ["explain", out, "1"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "98.00%" in shown.stdout
    assert "so step 3 has plan" in shown.stdout
    told = CliRunner().invoke(app, ["explain", out, "1", "--json"])
    assert json.loads(told.stdout) == explain_step(config.ledger_path, 1)
    missing = CliRunner().invoke(app, ["explain", out, "99"])
    assert missing.exit_code == 2
    assert "knows nothing of step 99" in missing.stderr
