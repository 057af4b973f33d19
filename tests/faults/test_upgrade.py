"""What release 0.1.0 wrote is read by today's code, and goes on; see `tests/golden`."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory

from controller.app import bring_up
from controller.config import RunConfig
from controller.history import read_history
from controller.ledger import Ledger, read_rows, reading_ledger, verify
from controller.ledger_schema import SCHEMA_VERSION, Kind, plan_of
from controller.policy import artefact
from controller.policy.base import PolicyContext, PolicyState
from controller.policy.header import HEADER
from controller.policy.registry import make_policy
from loader_workers.token_shard import open_token_shard
from protos import codec
from protos.errors import LedgerError
from protos.types import Step
from tests.fakes_controller import ACODM, bench, make_beat, small_run
from trainer_client.checkpoint import unpack_state

GOLDEN = Path(__file__).parents[1] / "golden" / "v0.1.0"


def _plans() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "plans.json").read_text())
    return found


def _old_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Lay the files of the old run where its run file has them."""
    monkeypatch.chdir(folder)
    (folder / "run" / "out").mkdir(parents=True)
    shutil.copy(GOLDEN / "index.parquet", folder / "run")
    shutil.copy(GOLDEN / "ledger.sqlite", folder / "run" / "out")
    (folder / "run" / "out" / "policy").mkdir()
    shutil.copy(GOLDEN / "after-000000008-steps.safetensors", folder / "run" / "out" / "policy")
    return small_run(
        Path("run"),
        policy=ACODM,
        guard={"time_budget_s": 30.0},
        control={"snapshot_every": 4, "report_grace_s": 0.3, "worker_timeout_s": 5},
    )


def _version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


@pytest.mark.fault_row(36, "a ledger of schema version 1 opened by today's controller")
def test_an_old_ledger_is_upgraded_when_it_is_opened_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_injections: Callable[..., None]
) -> None:
    config = _old_run(tmp_path, monkeypatch)
    assert _version(config.ledger_path) == 1
    with reading_ledger(config.ledger_path) as database:
        num_rows, _ = verify(database, config.ledger_path)  # only read, it stays as it is
    assert _version(config.ledger_path) == 1
    known = _plans()

    async def go_on() -> None:
        with bench(config) as controller:
            assert controller.ledger.epoch == 1
            assert controller.state.sealed_through == known["sealed_through"]
            assert controller.spec.has_order(known["order_sha256"])
            history = read_history(controller.ledger, controller.spec)
            assert [q.sample for q in history.quarantines] == [3]
            controller.workers.told_plans("worker-0")
            for _ in range(2):
                controller.workers.beat(make_beat(generation=1))
            await controller.report_step(11, world_size=2)
            assert controller.state.observed_through == 11

    asyncio.run(go_on())
    assert _version(config.ledger_path) == SCHEMA_VERSION
    with reading_ledger(config.ledger_path) as database:
        now, _ = verify(database, config.ledger_path)
        plans = [plan_of(row) for row in read_rows(database, Kind.PLAN)]
    assert now > num_rows
    told = [
        [plan.version, plan.first_step, list(plan.mixture.shares_q32), list(plan.carry_q32)]
        for plan in plans
    ]
    assert told[: len(known["plans"])] == known["plans"]
    record_injections(1)


def test_a_ledger_of_a_newer_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path):
        pass
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(LedgerError, match="use the program that wrote it"):
        Ledger(path)


@pytest.mark.fault_row(36, "policy state, token shard and trainer state of release 0.1.0")
def test_old_files_are_read(record_injections: Callable[..., None]) -> None:
    found = artefact.read(GOLDEN / "after-000000008-steps.safetensors")
    assert found.origin["steps"] == 8
    assert found.state.arrays
    shard = open_token_shard(GOLDEN / "shard.tokens", verify=True)
    assert shard.tokens.tolist() == list(range(1, 8))
    assert shard.unreadable == ((1, "why"),)
    resume = unpack_state(json.loads((GOLDEN / "trainer_state.json").read_text()))
    assert resume.step == 5
    assert len(resume.cursors) == 4
    record_injections(3)


@pytest.mark.fault_row(36, "policy state of before a setting that there is today")
def test_an_old_policy_state_goes_on_where_settings_have_come_since(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_injections: Callable[..., None],
) -> None:
    config = _old_run(tmp_path, monkeypatch)
    held = artefact.load(GOLDEN / "after-000000008-steps.safetensors")
    new = config.policy.model_dump().keys() - held.values[HEADER]["settings"].keys()
    assert "update_every" in new

    async def restored() -> PolicyState:
        with bench(config) as controller:
            history = read_history(controller.ledger, controller.spec)
            await bring_up(controller.runner, history, controller.ledger, controller.ledger_thread)
        context = PolicyContext(
            domains=controller.spec.domains,
            domain_sizes=(1.0,) * controller.spec.num_domains,
            num_steps=controller.spec.num_steps,
            global_sequences=controller.spec.global_sequences,
            seed=controller.spec.seed,
        )
        policy = make_policy(config.policy, context)
        policy.restore(held)
        other = make_policy(config.policy.model_copy(update={"update_every": 3}), context)
        with pytest.raises(ValueError, match="with update_every 1, the run has 3"):
            other.restore(held)
        return policy.state()

    caplog.set_level("INFO", logger="controller.app")
    again = asyncio.run(restored())
    assert "cannot be used" not in caplog.text
    assert re.search(r"policy replayed \d+ steps after step 7", caplog.text)
    for name, array in held.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    record_injections(len(new))


@pytest.mark.fault_row(36, "wire messages of release 0.1.0")
def test_old_messages_are_understood_and_say_the_same_again(
    record_injections: Callable[..., None],
) -> None:
    recorded = json.loads((GOLDEN / "wire.json").read_text())
    for name, message in recorded.items():
        raw = bytes.fromhex(message["hex"])
        descriptor = descriptor_pool.Default().FindMessageTypeByName(message["type"])
        parsed = message_factory.GetMessageClass(descriptor).FromString(raw)
        assert parsed.SerializeToString(deterministic=True) == raw, name
    parse = _parser(recorded)
    answer = codec.report_answer_from_proto(parse("ReportResponse"))
    assert (answer.sealed_through, answer.epoch) == (12, 0)
    event = codec.plan_event_from_proto(parse("PlanEvent"))
    assert (event.reset, event.epoch) == (True, 0)
    report = codec.report_from_proto(parse("ReportRequest"))
    assert (report.rank, report.step) == (1, Step(3))
    assert np.isfinite(report.loss_sum).all()
    request = codec.join_request_from_proto(parse("JoinRequest"))
    assert request.resume is not None
    assert request.resume.step == 5
    record_injections(len(recorded))


def _parser(recorded: dict[str, Any]) -> Callable[[str], Any]:
    def parse(name: str) -> Any:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(recorded[name]["type"])
        raw = bytes.fromhex(recorded[name]["hex"])
        return message_factory.GetMessageClass(descriptor).FromString(raw)

    return parse
