"""Log lines as JSON: one object a line, with run, rank, step and worker as fields."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from protos import log_format
from protos.errors import ConfigError
from protos.log_format import JsonFormatter, configure_logging, set_coordinates
from tests.fakes_controller import run_document, small_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def coordinates() -> Iterator[None]:
    former = dict(log_format._coordinates)
    log_format._coordinates.clear()
    yield
    log_format._coordinates.clear()
    log_format._coordinates.update(former)


def line(message: str, *values: Any, level: int = logging.WARNING) -> dict[str, Any]:
    record = logging.LogRecord("controller.loop", level, __file__, 1, message, values, None)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_coordinates_are_fields_of_their_own() -> None:
    set_coordinates(run="mine", rank=3)
    found = line("report lost rank=%d step=%d: %s", 7, 40, "no answer")
    assert found["message"] == "report lost rank=7 step=40: no answer"
    # What a line says itself is nearer than what its process is.
    assert (found["run"], found["rank"], found["step"]) == ("mine", 7, 40)
    assert (found["level"], found["logger"]) == ("warning", "controller.loop")
    assert found["time"].endswith("Z")
    assert line("worker %s serves run %s at %s", "w-1", "x", "y")["worker"] == "w-1"
    assert line("%s broke worker=%s: %s", "enlist", "w-2", "z")["worker"] == "w-2"
    assert line("%d%% of step %d", 50, 9)["step"] == 9


def test_what_a_value_holds_is_no_coordinate() -> None:
    found = line('refused %r of %s: "%s"', "step=%d rank=9", "rank=1\nstep=2", '"}')
    assert "rank" not in found
    assert "step" not in found
    assert "step=2" in found["message"]


def test_exceptions_and_odd_values_stay_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "it failed", (), sys.exc_info())
    found = json.loads(JsonFormatter().format(record))
    assert "ValueError: two\nlines" in found["exception"]
    assert line("worker=%s", Path("a"))["worker"] == "a"
    plain = logging.LogRecord("x", logging.ERROR, "", 1, "100% rank=%d", None, None)
    assert json.loads(JsonFormatter().format(plain))["message"] == "100% rank=%d"


def test_a_format_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="text or json .*got 'xml'"):
        configure_logging()


@pytest.mark.slow
@pytest.mark.parametrize("by_option", [True, False])
def test_a_controller_logs_json(tmp_path: Path, by_option: bool) -> None:
    small_run(tmp_path)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_document(tmp_path), sort_keys=False))
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "controller", str(run_file), "--verbose"),
            *(["--log-format", "json"] if by_option else []),
        ],
        cwd=ROOT,
        env={**os.environ, "HEADRACE_LOG_FORMAT": "" if by_option else "json"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline().startswith("headrace controller ready at ")
        serving.send_signal(signal.SIGTERM)
        _, told = serving.communicate(timeout=60)
    said = [json.loads(each) for each in told.splitlines()]
    assert {each["run"] for each in said} == {"small"}
    assert any(each["message"].startswith("serving run=small") for each in said)
