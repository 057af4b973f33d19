"""`headrace verify` on a run whose parts were started one by one: its ledger knows the run file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.commands import app
from deploy.report import examine
from tests.fakes_consumer import DOMAINS, consumed_run, write_corpus, write_run

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
