"""The command line: help that is there, exit codes that mean something, one sentence an error."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from controller.ledger_lock import LedgerLock
from deploy import overview
from deploy.commands import app
from deploy.exits import EXIT_CODES, exit_code
from deploy.failures import Stopped, TrainerFailed
from deploy.runfile import RunOptions, compose
from protos.errors import (
    AlreadyServing,
    ConfigError,
    ControllerUnreachable,
    DomainEmpty,
    HeadraceError,
    LedgerError,
    UnknownDomain,
)
from tests.harness_runs import ROOT

COMMANDS = [
    ["run"],
    ["compare"],
    ["pack"],
    ["index"],
    ["verify"],
    ["explain"],
    ["export"],
    ["replay"],
    ["report"],
    ["controller"],
    ["up"],
    ["down"],
    ["logs"],
    ["status"],
    ["mixture"],
    ["mixture", "set"],
    ["freeze"],
    ["resume"],
    ["snapshot"],
    ["drain"],
    ["scale"],
    ["doctor"],
]

NOBODY = "127.0.0.1:1"
"""An address at which nothing serves."""


def test_the_commands_are_those_that_are_listed_here() -> None:
    names = {command.name for command in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert names == {command[0] for command in COMMANDS}


def test_the_overview_says_of_each_command_what_the_command_says_of_itself() -> None:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009 - typer's own class
    first_lines = {
        name: " ".join(command.help.partition("\n\n")[0].split())
        for name, command in commands.items()
    }
    assert first_lines == overview.COMMANDS


def test_help_imports_neither_ray_nor_torch_nor_grpc() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deploy.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"ray", "torch", "grpc", "numpy"}
    assert "doctor" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ControllerUnreachable("x"), 1),
        (ConfigError("x"), 2),
        (UnknownDomain("x"), 2),
        (AlreadyServing("x"), 3),
        (DomainEmpty("x"), 4),
        (LedgerError("x"), 5),
        (TrainerFailed("x"), 6),
        (Stopped("x"), 130),
    ],
)
def test_errors_have_exit_codes(error: HeadraceError, code: int) -> None:
    assert exit_code(error) == code


def test_no_two_kinds_of_trouble_but_bad_input_share_a_code() -> None:
    codes = [code for base, code in EXIT_CODES.items() if base is not ConfigError]
    assert len(set(codes)) == len(codes)


def fails(arguments: list[str], *, code: int, says: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("headrace: ")
    assert says in lines[0]


@pytest.mark.parametrize(
    "command", [["status"], ["freeze"], ["resume"], ["snapshot"], ["drain"], ["scale", "2"]]
)
def test_a_controller_that_does_not_answer_is_said_in_a_sentence(command: list[str]) -> None:
    fails([*command, NOBODY], code=1, says=NOBODY)


def test_bad_input_ends_with_code_2(tmp_path: Path) -> None:
    fails(["status", "nonsense"], code=2, says="HOST:PORT")
    fails(["mixture", "set", NOBODY, "web"], code=2, says="DOMAIN=NUMBER, got 'web'")
    fails(["pack", str(tmp_path / "none"), str(tmp_path / "out")], code=2, says="is not a folder")
    fails(["index", str(tmp_path / "none.yaml")], code=2, says="cannot read the run file")
    fails(["verify", str(tmp_path)], code=2, says="cannot read the run file")


def run(tmp_path: Path, *arguments: str) -> list[str]:
    return ["run", "--out", str(tmp_path / "out"), *arguments]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "magic"], "magic"),
        (["--policy", "doremi"], "policy doremi needs a reference model's losses"),
        (["--policy", "aioli"], "policy aioli needs losses on held-out documents"),
        (["--steps", "0"], "steps"),
        (["--set", "batch.lanes=5"], "global_sequences must be a multiple of lanes"),
        (["--set", "batch.size=5"], "size"),
        (["--set", "nonsense"], "--set wants dotted.key=value, got 'nonsense'"),
        (["--set", "steps.more=3"], "steps is a value, not a section"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all is not a folder"),
        (["--config", "/nowhere.yaml"], "cannot read the run file /nowhere.yaml"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--fresh"], "--resume needs the --out"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    fails(run(tmp_path, *arguments), code=2, says=says)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps({"text": f"document {index} " * 20}) + "\n" for index in range(20))
    (tmp_path / "data" / "web.jsonl").write_text(lines)
    (tmp_path / "bad.json").write_text("{}")
    arguments = ["--data", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "bad.json")]
    fails(run(tmp_path, *arguments), code=4, says="bad.json is not a tokenizer file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--lanes", "16", "--global-sequences", "32"], 4, "each of the 16 lanes needs"),
        (["--policy", "static", "--set", "policy.mixture={nowhere: 1}"], 2, "nowhere"),
        (["--set", "data.eot_token=<none>"], 4, "has no token '<none>'"),
    ],
)
def test_data_that_does_not_fit_the_settings_is_refused_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps({"text": f"document {index} " * 20}) + "\n" for index in range(10))
    (tmp_path / "data" / "web.jsonl").write_text(lines)
    result = CliRunner().invoke(app, run(tmp_path, "--data", str(tmp_path / "data"), *arguments))
    assert result.exit_code == code, result.output
    assert says in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_text("run: other\n")
    fails(run(tmp_path), code=2, says="holds a run already: --resume goes on with it")
    assert (tmp_path / "out" / "run.yaml").read_text() == "run: other\n"


def packed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("code", "web"):
        rows = [json.dumps({"text": f"{name} {index} " * 30}) + "\n" for index in range(20)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(rows))
    # In this process: others would take seconds to start.
    result = CliRunner().invoke(
        app, ["pack", str(tmp_path / "data"), str(tmp_path / "shards"), "--processes", "1"]
    )
    assert result.exit_code == 0, result.output


def run_file(tmp_path: Path, **changes: object) -> Path:
    domains = {
        name: {"shards": [str(tmp_path / f"shards/{name}/*.tar")]} for name in ("code", "web")
    }
    data = {"index": str(tmp_path / "index.parquet"), "vocab_size": 256, "eot_id": 0}
    settings: dict[str, object] = {
        "run": "test",
        "steps": 5,
        "out": str(tmp_path / "out"),
        "address": "127.0.0.1:0",
        "data": {**data, "domains": domains},
        "batch": {"global_sequences": 4, "sequence_length": 8, "lanes": 2},
        "policy": {"name": "uniform"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def test_pack_and_index_print_json_that_a_program_can_read(tmp_path: Path) -> None:
    packed(tmp_path)
    result = CliRunner().invoke(app, ["index", str(run_file(tmp_path)), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["domains"]["web"]["num_samples"] == 20
    assert len(found["sha256"]) == 64
    again = CliRunner().invoke(
        app, ["pack", str(tmp_path / "data"), str(tmp_path / "more"), "--json"]
    )
    assert json.loads(again.stdout)["code"]["num_documents"] == 20


def test_a_domain_without_shards_ends_with_code_4(tmp_path: Path) -> None:
    fails(["index", str(run_file(tmp_path))], code=4, says="no file matches")


def test_an_unknown_key_in_the_run_file_ends_with_code_2(tmp_path: Path) -> None:
    fails(["index", str(run_file(tmp_path, stepps=3))], code=2, says="stepps")


def test_a_second_controller_on_the_ledger_ends_with_code_3(tmp_path: Path) -> None:
    packed(tmp_path)
    lock = LedgerLock(tmp_path / "out" / "ledger.sqlite")
    try:
        fails(["controller", str(run_file(tmp_path))], code=3, says="is held by process")
    finally:
        lock.close()


def test_a_second_controller_on_the_port_ends_with_code_3(tmp_path: Path) -> None:
    packed(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        fails(["controller", str(run_file(tmp_path, address=address))], code=3, says=address)


def test_doctor_finds_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(app, ["doctor", "--address", address, "--json"])
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 2
    assert findings["port"]["stops"]
    assert findings["Python"]["ok"]


def test_settings_come_from_built_in_then_file_then_options_then_set(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("steps: 70\nseed: 5\nbatch: {lanes: 4}\npolicy: {name: odm, smoothing: 0.2}\n")
    options = RunOptions(
        out=tmp_path / "out", config=base, seed=6, settings=("batch.window_samples=128",)
    )
    settings = compose(options)
    assert (settings["steps"], settings["seed"]) == (70, 6)
    assert settings["batch"]["lanes"] == 4
    assert settings["batch"]["window_samples"] == 128
    assert settings["batch"]["sequence_length"] == 128
    assert settings["policy"] == {"name": "odm", "smoothing": 0.2}


def test_the_small_networks_are_for_the_tiny_model_and_give_way_to_what_is_set(
    tmp_path: Path,
) -> None:
    tiny = compose(RunOptions(out=tmp_path, settings=("policy.width=64",)))
    assert tiny["policy"] == {"name": "acodm", "width": 64, "depth": 3}
    larger = compose(RunOptions(out=tmp_path, model="70m"))
    assert larger["policy"] == {"name": "acodm"}
