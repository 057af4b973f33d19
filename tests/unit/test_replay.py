"""`headrace replay`: the batches that trainers received, made again."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind
from deploy.commands import app
from deploy.history import read_deliveries, trained_history, write_digests
from deploy.reading.replay import parse_steps
from deploy.training import RECEIVED
from protos.errors import ConfigError
from tests.fakes_consumer import DOMAINS, consumed_run, write_corpus, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(100)]

NUM_STEPS = 40


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of forty steps, through five plans and several epochs, on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run_file = write_run(folder / "out", write_corpus(folder / "data"), steps=NUM_STEPS)
    with consumed_run(run_file) as run:
        run.consume(2, until=NUM_STEPS)
    return folder / "out"


@pytest.fixture(scope="module")
def delivered(out: Path) -> list[str]:
    """The digests that `headrace run --digest` writes: of what the ranks received."""
    history = trained_history(read_deliveries(out / RECEIVED, DOMAINS), global_sequences=20)
    write_digests(history, out / "digests.jsonl")
    lines = (out / "digests.jsonl").read_text().splitlines()
    assert len(lines) == NUM_STEPS * 20
    return lines


def replay(out: Path, to: Path, steps: str, *options: str) -> dict[str, Any]:
    command = ["replay", str(out), str(to), "--steps", steps, *options, "--json"]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    result: dict[str, Any] = json.loads(made.stdout)
    return result


@pytest.mark.parametrize("steps", ["0:40", "0:1", "7:19", "25:", "39", ":3"])
def test_any_range_of_steps_is_replayed_byte_for_byte(
    out: Path, delivered: list[str], tmp_path: Path, steps: str
) -> None:
    result = replay(out, tmp_path / "replayed", steps)
    first, end = result["first_step"], result["end_step"]
    wanted = parse_steps(steps)
    assert (first, end) == (wanted[0], wanted[1] or end)
    again = (tmp_path / "replayed" / "digests.jsonl").read_text().splitlines()
    assert (
        len(again)
        == result["sequences"]
        == (min(end, NUM_STEPS) - first) * 20 + (max(end - NUM_STEPS, 0) * 20)
    )
    # Plans are sealed ahead of the last step that was trained.
    assert again[: (NUM_STEPS - first) * 20] == delivered[first * 20 : min(end, NUM_STEPS) * 20]


def test_arrays_and_shards_hold_the_tokens_that_the_digests_are_of(
    out: Path, delivered: list[str], tmp_path: Path
) -> None:
    import hashlib

    replay(out, tmp_path / "npz", "11:13", "--format", "npz")
    replay(out, tmp_path / "tar", "11:13", "--format", "webdataset")
    with tarfile.open(tmp_path / "tar" / "replay-000000.tar") as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar.getmembers()}  # type: ignore[union-attr]
    for step in (11, 12):
        with np.load(tmp_path / "npz" / f"step-{step:09d}.npz") as arrays:
            tokens, num_tokens = arrays["tokens"], arrays["num_tokens"]
            domains = arrays["domain_ids"]
        rows = [json.loads(line) for line in delivered[step * 20 : (step + 1) * 20]]
        for slot, row in enumerate(rows):
            assert hashlib.sha256(tokens[slot].tobytes()).hexdigest() == row["sha256"]
            assert DOMAINS[domains[slot]] == row["domain"]
            key = f"{step:09d}-{slot:06d}"
            assert json.loads(members[f"{key}.json"]) == row
            kept = np.load(io.BytesIO(members[f"{key}.npy"]))
            assert kept.tolist() == tokens[slot, : num_tokens[slot]].tolist()


def test_a_run_without_places_in_its_ledger_is_replayed_from_its_beginning(
    out: Path, delivered: list[str], tmp_path: Path
) -> None:
    import sqlite3

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "run.yaml").write_text((out / "run.yaml").read_text())
    with sqlite3.connect(out / "ledger.sqlite") as source:
        with sqlite3.connect(copy / "ledger.sqlite") as target:
            source.backup(target)
            target.execute("DELETE FROM ledger WHERE kind = 'cursors'")
        target.close()
    source.close()
    replay(copy, tmp_path / "replayed", "23:25")
    again = (tmp_path / "replayed" / "digests.jsonl").read_text().splitlines()
    assert again == delivered[23 * 20 : 25 * 20]


def test_steps_of_another_plan_than_the_ledgers_are_told(out: Path, tmp_path: Path) -> None:
    import sqlite3

    copy = tmp_path / "ledger.sqlite"
    with sqlite3.connect(out / "ledger.sqlite") as source, sqlite3.connect(copy) as target:
        source.backup(target)
    target.close()
    source.close()
    with Ledger(copy) as ledger:
        step = next(ledger.rows(Kind.STEP, min_step=5, max_step=5))
        body = {**step.body, "executed_plan_versions": [99]}
        ledger.commit([Entry(kind=Kind.STEP, step=5, body=body)])
    made = CliRunner().invoke(
        app, ["replay", str(copy), str(tmp_path / "replayed"), "--steps", "4:7"]
    )
    assert made.exit_code == 4
    assert "step 5: ranks had another plan than the ledger has" in made.stdout


def test_what_cannot_be_replayed_is_refused(out: Path, tmp_path: Path) -> None:
    def refused(steps: str, *options: str) -> str:
        command = ["replay", str(out), str(tmp_path / "replayed"), "--steps", steps, *options]
        made = CliRunner().invoke(app, command)
        assert made.exit_code == 2, made.output
        assert list(tmp_path.iterdir()) == []
        return made.stderr

    assert "knows the plans of steps 0 to 4" in refused("30:4000")
    assert "--steps is A:B" in refused("3:3")
    assert "there is no format 'csv'" in refused("3:4", "--format", "csv")


def test_data_of_another_order_is_refused(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    text = (out / "run.yaml").read_text()
    assert "seed: 11" in text
    (copy / "run.yaml").write_text(text.replace("seed: 11", "seed: 12"))
    (copy / "ledger.sqlite").write_bytes((out / "ledger.sqlite").read_bytes())
    made = CliRunner().invoke(app, ["replay", str(copy), str(tmp_path / "to"), "--steps", "0:1"])
    assert made.exit_code == 2
    assert "belongs to data of another order" in made.stderr


@pytest.mark.parametrize("text", ["", ":", "a:b", "-1:4", "5:5", "7:2", "1:2:3"])
def test_ranges_that_are_none_are_refused(text: str) -> None:
    if text == ":":
        assert parse_steps(text) == (0, None)
        return
    with pytest.raises(ConfigError, match="--steps is A:B"):
        parse_steps(text)
