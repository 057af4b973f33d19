"""`headrace export`: everything that a ledger says, in tables."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from controller.config import RunConfig
from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind, event_entry, quarantine_entry
from deploy.commands import app
from deploy.examples.query_export import by_domain, by_domain_in_sql
from deploy.reading import writer
from deploy.reading.export import choose_tables, export
from deploy.reading.tables import TABLES
from deploy.record import read_record
from protos.errors import ConfigError, LedgerError
from protos.types import Quarantine
from tests.fakes_controller import DOMAINS, ODM, bench, resume_at, small_run

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path) -> RunConfig:
    """Train ten steps with a policy and a shadow, go back to step 6, train three again."""
    config = small_run(folder, policy=ODM, shadows=[ODM])

    async def steps() -> None:
        with bench(config) as made:
            await made.join_all(1)
            for step in range(10):
                await made.report_step(step, validation_loss=np.array([1.0, 2.0, 3.0]))
            await made.join_all(1, attempt="b", resume=resume_at(6, made.spec))
            for step in range(6, 9):
                await made.report_step(step)
            lost = Quarantine(domain="code", shard="code.tar", sample=-1, reason="damaged")
            made.loop.note(
                quarantine_entry(lost, worker_id="w-1"),
                event_entry("worker lost", worker="w-1", reason="silent"),
            )
            while made.shadows._backlog:
                await asyncio.sleep(0.001)
            await made.loop.snapshot()
            await made.loop.flush()

    asyncio.run(steps())
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return _run(tmp_path_factory.mktemp("run"))


def _rows(folder: Path, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(folder / table).to_table().to_pylist()
    return rows


def test_steps_and_observations_are_what_the_ledger_says(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export(config.out, out, tables=TABLES)
    record = read_record(config.ledger_path)
    assert exported.ledger_rows == record.num_rows
    live = [row for row in _rows(out, "steps") if not row["superseded"]]
    assert [row["step"] for row in live] == sorted(record.steps) == list(range(9))
    assert [row["generation"] for row in live] == [1] * 6 + [2] * 3
    seen = [row for row in _rows(out, "observations") if not row["superseded"]]
    assert len(seen) == 9 * len(DOMAINS)
    for row in seen:
        observation = record.steps[row["step"]].observation
        index = DOMAINS.index(row["domain"])
        assert row["tokens"] == observation.tokens[index]
        assert row["loss"] == observation.loss[index]
        assert row["planned_share"] == observation.planned[index]
        assert row["validation_loss"] == (index + 1.0 if row["step"] < 6 else None)
        assert row["excess_sum"] is None
        assert row["num_parts"] is None
    alignment = _rows(out, "alignment")
    first = record.steps[0].observation.alignment
    assert first is not None
    assert [row["products"] for row in alignment if row["step"] == 0] == first.tolist()


def test_what_was_trained_again_is_marked(config: RunConfig, tmp_path: Path) -> None:
    export(config.out, tmp_path / "out", tables=TABLES)
    steps = _rows(tmp_path / "out", "steps")
    assert [row["step"] for row in steps if row["superseded"]] == [6, 7, 8, 9]
    with reading_ledger(config.ledger_path) as database:
        forks = list(read_rows(database, Kind.FORK))
    assert [fork.step for fork in forks] == [6]
    for row in steps:
        assert row["superseded"] == (row["seq"] < forks[0].seq and row["step"] >= 6)


def test_plans_decisions_and_the_rest_are_there(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export(config.ledger_path, out, tables=TABLES)
    record = read_record(config.ledger_path)
    plans = _rows(out, "plans")
    assert len(plans) == len(record.plans) * len(DOMAINS)
    for plan in record.plans:
        mine = [row for row in plans if row["version"] == plan.version]
        assert tuple(row["share_q32"] for row in mine) == plan.mixture.shares_q32
        assert tuple(row["carry_q32"] for row in mine) == plan.carry_q32
        assert {row["first_step"] for row in mine} == {plan.first_step}
    decisions = _rows(out, "decisions")
    for step in range(6):
        mine = [row for row in decisions if row["step"] == step]
        assert sum(row["decided_share"] for row in mine) == pytest.approx(1)
        assert {row["proposed_step"] for row in mine} == {step + 2}
    assert [row["domain"] for row in _rows(out, "domains")] == list(DOMAINS)
    assert _rows(out, "domains")[1]["shards"] == ["code.tar"]
    (run,) = _rows(out, "runs")
    assert (run["run"], run["policy"]) == ("small", "odm")
    assert [row["generation"] for row in _rows(out, "generations")] == [1, 2]
    (quarantine,) = _rows(out, "quarantines")
    assert (quarantine["domain"], quarantine["sample"]) == ("code", None)
    assert {"worker": "w-1", "event": "worker lost", "reason": "silent"}.items() <= _rows(
        out, "workers"
    )[0].items()
    assert {row["kind"] for row in _rows(out, "events")} >= {"fork", "event", "snapshot"}
    shadows = _rows(out, "shadows")
    assert {row["shadow"] for row in shadows} == {"odm"}
    cursors = [row for row in _rows(out, "cursors") if row["step"] == 5]
    assert len(cursors) == 4 * len(DOMAINS)
    manifest = json.loads((out / "export.json").read_text())
    assert manifest["tables"] == exported.tables
    assert manifest["tables"] == {table.name: len(_rows(out, table.name)) for table in TABLES}


def test_units_are_in_the_files_and_all_files_have_the_schema(
    config: RunConfig, tmp_path: Path
) -> None:
    export(config.out, tmp_path / "out", tables=TABLES)
    for table in TABLES:
        (path,) = (tmp_path / "out" / table.name).iterdir()
        schema = pq.read_schema(path)
        for column in table.columns:
            field = schema.field(column.name)
            assert field.metadata[b"unit"].decode() == column.unit
            assert field.metadata[b"description"].decode() == column.what
            assert field.type == column.kind


def test_large_tables_are_cut_into_row_groups_and_files(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export(config.out, whole, tables=TABLES)
    monkeypatch.setattr(writer, "GROUP_ROWS", 6)
    monkeypatch.setattr(writer, "FILE_ROWS", 12)
    export(config.out, cut, tables=TABLES)
    paths = sorted((cut / "observations").iterdir())
    assert len(paths) == 4
    assert [pq.ParquetFile(path).num_row_groups for path in paths] == [2, 2, 2, 1]
    for table in TABLES:
        assert _rows(cut, table.name) == _rows(whole, table.name)


def test_chosen_tables_alone_are_written(config: RunConfig, tmp_path: Path) -> None:
    export(config.out, tmp_path / "out", tables=choose_tables("plans, steps"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plans", "steps", "export.json"}
    assert "alignment" not in {table.name for table in choose_tables(None)}
    assert choose_tables("all") == TABLES
    with pytest.raises(ConfigError, match="--tables names nonsense; an export has the tables"):
        choose_tables("steps,nonsense")


def test_a_damaged_ledger_leaves_nothing_behind(config: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "ledger.sqlite"
    with sqlite3.connect(config.ledger_path) as source, sqlite3.connect(copy) as target:
        source.backup(target)
        target.execute("UPDATE ledger SET body = replace(body, 'planned', 'PLANNED') WHERE seq = 9")
    target.close()
    source.close()
    with pytest.raises(LedgerError, match="row 9 .* was changed"):
        export(copy, tmp_path / "out", tables=TABLES)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_the_command_exports_and_refuses_to_overwrite(config: RunConfig, tmp_path: Path) -> None:
    arguments = ["export", str(config.out), str(tmp_path / "out")]
    made = CliRunner().invoke(app, [*arguments, "--json"])
    assert made.exit_code == 0
    assert json.loads(made.stdout)["tables"]["steps"] == 13
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "is there already" in again.stderr


def test_the_example_answers_from_the_export(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(config.out, out, tables=choose_tables(None))
    record = read_record(config.ledger_path)
    tokens = np.sum([record.steps[step].observation.tokens for step in record.steps], axis=0)
    answer = {row["domain"]: row["tokens"] for row in by_domain(out)}
    assert answer == dict(zip(DOMAINS, tokens.tolist(), strict=True))
    command = [sys.executable, "-m", "deploy.examples.query_export", str(out)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"web +\d+ +{answer['web']:,} ", said.stdout)
    assert "steps that waited longest" in said.stdout


def test_duckdb_answers_the_same(config: RunConfig, tmp_path: Path) -> None:
    export(config.out, tmp_path / "out", tables=choose_tables(None))
    rows = by_domain(tmp_path / "out")
    for ours, theirs in zip(rows, by_domain_in_sql(tmp_path / "out"), strict=True):
        assert {**theirs, "loss": None} == {**ours, "loss": None}
        assert theirs["loss"] == pytest.approx(ours["loss"])
