"""deploy/docs/reading-the-ledger.md: its commands are run, its tables are the export's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from deploy.reading.tables import TABLES, Table
from tests.fakes_consumer import ROOT, consumed_run, write_corpus, write_run

PAGE = ROOT / "deploy" / "docs" / "reading-the-ledger.md"
NUM_STEPS = 24


def commands() -> list[list[str]]:
    """Return what the page has in its bash blocks, with this Python for `headrace` and `python`."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.S)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    ours = {"headrace": [sys.executable, "-m", "deploy.cli"], "python": [sys.executable]}
    return [ours[line[0]] + line[1:] for line in words if line]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(240)
def test_every_command_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "my-run"
    run_file = write_run(out, write_corpus(tmp_path / "data"), steps=NUM_STEPS)
    with consumed_run(run_file) as run:
        run.consume(1, until=NUM_STEPS)
    told = {}
    for command in commands():
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        told[" ".join(command[2:])] = done.stdout
    assert len(told) >= 9
    assert told["deploy.cli verify runs/my-run"].endswith("clean\n")
    assert (out / "report.html").is_file()
    assert len((tmp_path / "replayed" / "digests.jsonl").read_text().splitlines()) == 8 * 20
    assert [path.name for path in (tmp_path / "arrays").iterdir()] == ["step-000000012.npz"]
    assert (tmp_path / "shards" / "replay-000000.tar").is_file()
    plain = told["deploy.examples.query_export exported"]
    assert "books" in plain
    assert told["deploy.examples.query_export exported --duckdb"] == plain


def shown(kind: Any) -> str:
    if pa.types.is_dictionary(kind):
        return "string"
    if pa.types.is_timestamp(kind):
        return "timestamp"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_documented_tables_are_those_of_the_export(table: Table) -> None:
    section = PAGE.read_text().split(f"\n### {table.name}\n")[1].split("\n### ")[0]
    sentence, rows = section.strip().split("\n\n", 1)
    assert sentence.lower().startswith(table.what.lower())
    assert ("Not exported unless asked for." in sentence) != table.by_default
    found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in rows.splitlines()
        if line.startswith("| `")
    ]
    assert found == [
        [f"`{column.name}`", shown(column.kind), column.unit or "-", column.what]
        for column in table.columns
    ]
