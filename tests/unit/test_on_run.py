"""Where commands about a live run look for its controller."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deploy.on_run import find_controller
from deploy.runfile import ADDRESS
from protos.errors import ConfigError
from tests.fakes_controller import run_document


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def _run_file(folder: Path, address: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_document(folder, address=address)))
    return path


def test_a_run_that_was_started_by_hand_is_where_its_file_says(tmp_path: Path) -> None:
    assert find_controller(str(_run_file(tmp_path, "127.0.0.1:7711"))) == "127.0.0.1:7711"


def test_what_the_runs_folder_says_goes_before_the_file(tmp_path: Path) -> None:
    path = _run_file(tmp_path, "127.0.0.1:7711")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ADDRESS).write_text("127.0.0.1:4242\n")
    assert find_controller(str(path)) == "127.0.0.1:4242"


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:7711"])
def test_an_address_that_nobody_can_call_is_not_guessed(tmp_path: Path, address: str) -> None:
    document = run_document(tmp_path, address=address, security={"insecure": True})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="name HOST:PORT"):
        find_controller(str(path))


def test_a_name_that_is_no_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="'nothing' is neither HOST:PORT nor"):
        find_controller("nothing")
