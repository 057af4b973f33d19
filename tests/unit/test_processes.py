"""Child processes end with all that they started, however deaf they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.processes import ORDERLY_S, ChildProcess, StopSignals, descendants
from tests.harness_runs import ROOT, wait_until

pytestmark = pytest.mark.slow

DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1:]:
    subprocess.Popen([sys.executable, "-u", __file__], start_new_session=True)
else:
    print("up")
time.sleep(600)
"""


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [sys.executable, str(tmp_path / "deaf.py"), "with a child"]
    others = descendants(os.getpid())  # of other tests, such as a resource tracker
    process = ChildProcess(command, log=log, env=os.environ)
    wait_until(lambda: "up" in log.read_text(), timeout_s=20, what="the grandchild")
    assert process.poll() is None
    family = descendants(os.getpid()).keys() - others.keys()
    with StopSignals() as stop:
        process.stop(stop, grace_s=0.2)
    assert process.poll() == -signal.SIGKILL
    assert len(family) >= 2
    wait_until(lambda: not any(map(lives, family)), timeout_s=10, what="the children's end")


def test_a_process_that_ends_by_itself_leaves_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier start\n")
    program = "for number in range(100): print('line', number)\nraise SystemExit(3)"
    process = ChildProcess([sys.executable, "-c", program], log=log, env=os.environ)
    wait_until(lambda: process.poll() is not None, timeout_s=20, what="its end")
    assert process.poll() == 3
    assert process.last_lines(2) == ["line 98", "line 99"]
    assert "of an earlier start" not in process.last_lines(1000)


def test_signals_are_events_while_they_are_watched_and_then_what_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop.wait(0)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(5)
        assert (stop.asked, stop.hurry, stop.signal) == (True, False, signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.hurry
    assert signal.getsignal(signal.SIGTERM) is before


ORPHANING = """
import subprocess, sys
subprocess.Popen([sys.executable, sys.argv[1]], start_new_session=True)
"""

STUCK = """
import subprocess, sys, time
from pathlib import Path
from deploy.last_resort import last_resort
from deploy.processes import Family, StopSignals

folder = Path(sys.argv[1])
family = Family()
with StopSignals(), last_resort(family, folder, within_s=0.5):
    # It ends at once; what it has started does not.
    subprocess.run([sys.executable, sys.argv[2], sys.argv[3]], check=True)
    print(*family.members(), flush=True)
    while sys.argv[4] == "stuck":
        time.sleep(1)
    sys.exit(3)
"""


@pytest.mark.parametrize("how", ["stuck", "fails"])
def test_all_that_a_process_started_ends_with_it_also_where_it_does_not_stop_in_time(
    how: str, tmp_path: Path
) -> None:
    for name, text in (("deaf.py", DEAF), ("orphaning.py", ORPHANING), ("stuck.py", STUCK)):
        (tmp_path / name).write_text(text)
    folder = tmp_path / "temporary"
    folder.mkdir()
    (folder / "file").touch()
    scripts = [str(tmp_path / name) for name in ("orphaning.py", "deaf.py")]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stuck.py"), str(folder), *scripts, how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    (member,) = map(int, process.stdout.readline().split())
    if how == "stuck":
        assert lives(member)
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if how == "stuck" else 3)
    assert ("ended 0.5 s after it was told to stop" in said) == (how == "stuck")
    assert not lives(member)
    assert folder.exists() == (how == "fails")


def test_a_signal_interrupts_a_block_once_and_then_only_asks_to_hurry() -> None:
    with StopSignals() as stop:
        assert stop.patience_s(7.0) == 7.0
        with pytest.raises(KeyboardInterrupt), stop.raising():
            signal.raise_signal(signal.SIGTERM)
        assert 0 < stop.patience_s(7.0) <= ORDERLY_S
        assert stop.patience_s(0.1) == pytest.approx(0.1)
        signal.raise_signal(signal.SIGINT)
        assert stop.hurry
        assert stop.signal == signal.SIGTERM
        assert stop.patience_s(7.0) == 0
