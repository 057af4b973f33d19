"""`headrace compare` with bad input: a sentence and an exit code, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.commands import app
from deploy.compare.record import trial_folder, write_record
from deploy.compare.spec import keep_spec
from tests.fakes_compare import made_up_record, small_spec
from tests.harness_runs import write_corpus

ARMS: dict[str, Any] = {"natural": {"name": "natural"}, "uniform": {"name": "uniform"}}


def fails(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2, result.output
    text = " ".join(result.stderr.split())
    assert says in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "compare needs a YAML file, a comparison's folder, or --data"),
        (["--data", "{corpus}", "--policies", "odn"], "policy.name is 'odn'"),
        (["--data", "{corpus}", "--model", "2m"], "there is no model '2m'"),
        (["--data", "{corpus}", "--only", "ado"], "--only names 'ado'"),
        (["--data", "{tmp}/nowhere"], "is not a folder"),
        (["{tmp}/nowhere.yaml"], "cannot read the comparison"),
        (["{corpus}"], "holds no comparison"),
        (["{spec}", "--data", "{corpus}"], "leave out --data"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    spec = tmp_path / "compare.yaml"
    spec.write_text(yaml.safe_dump(json.loads(small_spec(corpus, ARMS).model_dump_json())))
    places = {"corpus": corpus, "tmp": tmp_path, "spec": spec}
    out = tmp_path / "out"
    fails([*(each.format(**places) for each in arguments), "--out", str(out)], says)
    assert not out.exists()


def test_a_finished_comparison_needs_neither_its_text_nor_a_trial(tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = small_spec(tmp_path / "gone", ARMS)
    keep_spec(spec, out)
    for arm in ARMS:
        folder = trial_folder(out, arm, 0)
        folder.mkdir(parents=True)
        write_record(made_up_record(arm, 0, [[6.0, 6.5], [5.0, 5.5]]), folder)
    result = CliRunner().invoke(app, ["compare", str(out), "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert set(results["arms"]) == {"natural", "uniform"}
    assert results == json.loads((out / "results.json").read_text())
