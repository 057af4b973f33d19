"""`headrace verify` on a run whose parts were started one by one: its ledger knows the run file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.commands import app
from deploy.report import examine
from tests.fakes_consumer import DOMAINS, consumed_run, write_corpus, write_run
from trainer_client import merge_states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(100)]


def test_a_run_without_a_run_file_in_its_folder_is_verified_from_its_ledger(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    run_file = write_run(out, write_corpus(tmp_path / "data"), steps=12)
    with consumed_run(run_file) as run:
        run.consume(1, until=12)
    run_file.unlink()
    verified = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["sequences"] == 12 * 20
    # Their order is part of the run, and the ledger's JSON has its keys sorted.
    assert tuple(examine(out).config.data.domains) == DOMAINS != tuple(sorted(DOMAINS))


def test_an_index_that_is_not_the_runs_is_told_before_all_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    patterns = write_corpus(tmp_path / "data")
    run_file = write_run(out, patterns, steps=3)
    with consumed_run(run_file) as run:
        run.consume(1, until=3)
    other = write_run(tmp_path / "other", write_corpus(tmp_path / "more", documents=(60, 45, 33)))
    (out / "index.parquet").write_bytes((other.parent / "index.parquet").read_bytes())
    verified = CliRunner().invoke(app, ["verify", str(out)])
    assert verified.exit_code == 4, verified.output
    assert "is not what its ledger was written for" in verified.stderr
    (out / "index.parquet").write_bytes(b"PAR1 and no more")
    damaged = CliRunner().invoke(app, ["verify", str(out)])
    assert damaged.exit_code == 4, damaged.output


@pytest.mark.fault_row(22, "a run's ledger put back to an earlier state of itself")
def test_a_ledger_that_was_put_back_is_told_by_the_head_in_a_checkpoint(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    out, earlier = tmp_path / "out", tmp_path / "earlier.sqlite"
    run_file = write_run(out, write_corpus(tmp_path / "data"), steps=12)

    def after_step(step: int) -> None:
        if step == 0:
            with closing(sqlite3.connect(out / "ledger.sqlite")) as database:
                database.execute("VACUUM INTO ?", (str(earlier),))

    with consumed_run(run_file) as run:
        states = run.consume(2, until=12, keep=(9,), after_step=after_step)
    head = merge_states(states[9])["ledger_head"]
    verified = CliRunner().invoke(app, ["verify", str(out), "--head", head, "--json"])
    assert verified.exit_code == 0, verified.output
    newest = json.loads(verified.stdout)["ledger_head"]
    assert int(newest.split(":")[0]) > int(head.split(":")[0])
    for left in out.glob("ledger.sqlite*"):
        left.unlink()
    earlier.rename(out / "ledger.sqlite")
    for kept in (head, newest):
        put_back = CliRunner().invoke(app, ["verify", str(out), "--head", kept])
        assert put_back.exit_code == 5, put_back.output
        assert "was rolled back to an older state" in put_back.stderr
    record_injections(1, "its own chain is sound")
    refused = CliRunner().invoke(app, ["verify", str(out), "--head", "newest"])
    assert refused.exit_code == 2
    assert "a ledger's head is ROW:HASH" in refused.stderr
