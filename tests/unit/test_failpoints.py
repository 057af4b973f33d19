"""Failpoints: unarmed they do nothing, armed they strike at the nth time, and never by mistake."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from protos import failpoints
from protos.errors import ConfigError
from protos.failpoints import VARIABLE, DurableWrite, Failpoint, arm, places

PLACE = Failpoint("test.place", "in a test")
WRITE = DurableWrite("test.write", "a test writes")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    arm({})


def test_an_unarmed_place_does_nothing() -> None:
    arm({})
    PLACE.hit()
    with WRITE.around():
        pass
    assert failpoints._armed is None


def test_an_armed_place_raises_at_the_nth_time_and_then_no_more(
    capfd: pytest.CaptureFixture[str],
) -> None:
    arm({VARIABLE: "test.place:2:ENOSPC,test.write.after:1:EIO"})
    PLACE.hit()
    with pytest.raises(OSError, match="No space left") as raised:
        PLACE.hit()
    assert raised.value.errno == errno.ENOSPC
    PLACE.hit()
    came_here = False
    with pytest.raises(OSError, match="test.write.after"), WRITE.around():
        came_here = True
    assert came_here
    assert "failpoint test.place hit: ENOSPC" in capfd.readouterr().err


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_an_armed_place_sends_its_process_a_signal(action: str) -> None:
    script = (
        "import os; from protos.failpoints import *; place = Failpoint('p', 'q');"
        f"arm({{VARIABLE: 'p:1:{action}'}}); place.hit(); print('went on')"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        if action == "stop":
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            process.kill()
        assert process.wait(20) == -signal.SIGKILL
        assert f"failpoint p hit: {action}" in process.stderr.read().decode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("test.plaice:1:kill", "no failpoint 'test.plaice'"),
        ("test.place", "NAME:NTH:ACTION"),
        ("test.place:0:kill", "counted from 1"),
        ("test.place:1:explode", "no action 'explode'"),
    ],
)
def test_what_cannot_be_armed_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        arm({VARIABLE: text})


def test_no_two_places_have_one_name_and_all_say_what_they_are() -> None:
    with pytest.raises(ValueError, match="two failpoints"):
        Failpoint("test.place", "again")
    assert places()["test.write.before"] == "before a test writes"
