"""What a terminal of 80 x 24 shows, and what a pipe gets: no control characters, few lines."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deploy.progress import Progress, working
from deploy.screen import printable, status_line, status_panel
from protos.status import RunStatus, ShadowStatus, WorkerStatus
from protos.types import Mixture, Quarantine, Step
from tests.fakes_served import Served, served
from tests.terminals import ROOT, terminal

HOSTILE = ("[red]web[/red]", "\x1b[2Jcode", "\x07\r\nbooks\u202eevil", "n" * 300)


def a_status(*, num_domains: int = 4, num_workers: int = 2) -> RunStatus:
    domains = (*HOSTILE, *(f"domain-{number:03d}" for number in range(num_domains)))[:num_domains]
    workers = tuple(
        WorkerStatus(
            worker_id=f"worker-{number}",
            endpoint="127.0.0.1:1",
            alive=number % 5 != 4,
            lanes=tuple(range(number, 4096, num_workers)),
            cache_bytes=0,
            stall_s=0.0,
            sequences_served=10**9,
        )
        for number in range(num_workers)
    )
    return RunStatus(
        run_id="a-run-with-quite-a-long-name-" * 3,
        policy="acodm",
        policy_phase="warm-up",
        phase="running",
        domains=domains,
        mixture=Mixture.from_shares([1.0 + number for number in range(num_domains)]),
        plan_version=3,
        observed_step=99_999,
        sealed_through=100_001,
        num_steps=1_000_000,
        generation=1,
        world_size=4096,
        loss=tuple(2.0 if number % 3 else float("nan") for number in range(num_domains)),
        tokens=10**13,
        tokens_per_s=1.5e7,
        data_wait_share=0.01,
        degraded_steps=3,
        missing_reports=4,
        held_decisions=5,
        decision_ms_p50=1.0,
        decision_ms_p99=2.0,
        frozen=True,
        ledger_fault="no space left on the device " * 4,
        quarantines=(Quarantine(domain="code", shard="a.tar", sample=1, reason="bad"),),
        workers=workers,
        shadows=(
            ShadowStatus(name="odm", phase="acting", shares=(), fault="it failed\x1b[31m"),
            ShadowStatus(
                name="ado",
                phase="acting",
                shares=tuple([1 / num_domains] * num_domains),
                fault="",
            ),
        ),
    )


def drawn(status: RunStatus, *, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    console.print(status_panel(status, width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("num_domains", [1, 4, 22, 200])
@pytest.mark.parametrize("num_workers", [0, 2, 40])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 20), (120, 50)])
def test_a_panel_fits_its_terminal(
    num_domains: int, num_workers: int, width: int, height: int
) -> None:
    lines = drawn(
        a_status(num_domains=num_domains, num_workers=num_workers), width=width, height=height
    )
    assert len(lines) <= height - 1
    for line in lines:
        assert len(line) <= width
        assert all(each.isprintable() for each in line), line


def test_workers_that_are_silent_or_lost_are_named_however_many_there_are() -> None:
    for num_workers in (3, 40):
        status = a_status(num_workers=num_workers)
        first, second, *rest = status.workers
        workers = (replace(first, silent_s=7.0), replace(second, alive=False), *rest)
        lines = drawn(replace(status, workers=workers), width=200, height=60)
        assert any("worker-0 silent for 7 s " in line for line in lines)
        assert any("worker-1 lost " in line for line in lines)


def test_the_largest_domains_are_shown_and_the_others_added_up() -> None:
    status = a_status(num_domains=200)
    text = "\n".join(drawn(status, width=80, height=24))
    shown = [number for number in range(196) if f"domain-{number:03d}" in text]
    # The last has the largest share.
    assert shown == list(range(196 - len(shown), 196))
    assert len(shown) >= 5
    left = 200 - len(shown)
    assert f"{left} more" in text
    rest = sum(status.mixture.shares[:left])
    assert f"{rest:.1%}" in text


def test_names_are_shown_as_they_are_without_what_moves_a_cursor() -> None:
    text = "\n".join(drawn(a_status(), width=80, height=24))
    assert "[red]web[/red]" in text
    assert "\N{REPLACEMENT CHARACTER}[2Jcode" in text
    assert "\u202e" not in text
    assert printable("a\tb\x9bc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    line = status_line(a_status(num_domains=200))
    assert "and 192 more" in line
    assert line.isprintable()


def plain(console_width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=console_width), file


def test_work_says_few_plain_lines_to_a_pipe() -> None:
    clock = iter([0.0, *(0.1 * number for number in range(1, 400))])
    console, file = plain()
    with working(console, "indexing", now=lambda: next(clock)) as update:
        for number in range(150):
            update(f"{number} of 150 \x1b[2Jshards")
    lines = file.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.isprintable() and line.startswith("indexing: ") for line in lines)


def test_work_that_is_short_says_nothing_to_a_pipe() -> None:
    console, file = plain()
    with working(console, "indexing", now=lambda: 0.0) as update:
        update("1 of 2")
    assert file.getvalue() == ""


def test_progress_says_what_it_says_without_control_characters() -> None:
    console, file = plain()
    with Progress(console, now=lambda: 0.0) as progress, progress.stage("packing") as update:
        update("web")
        progress.say("worker \x1b[2J has [bold]gone[/bold]\nand a second line")
    assert file.getvalue() == (
        "worker \N{REPLACEMENT CHARACTER}[2J has [bold]gone[/bold]\nand a second line\n"
        "packing: 0.0 s\n"
    )


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with Progress(console, now=lambda: 0.0) as progress:
        progress.show(a_status())
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().startswith("step 100000/1000000 · ")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as made:
        made.do(made.bench.join_all(1))
        made.do(made.bench.report_step(0))
        yield made


@pytest.mark.slow
def test_a_watch_follows_a_run_and_ctrl_c_leaves_the_screen_as_it_was(live: Served) -> None:
    with terminal(["status", live.address, "--watch", "--interval", "0.1"]) as shown:
        shown.wait_for(lambda: "step 1/40" in shown.text)
        shown.wait_for(lambda: "Ctrl-C ends the watch" in shown.text)
        assert "web" in shown.text
        live.do(live.bench.report_step(1))
        shown.wait_for(lambda: "step 2/40" in shown.text)
        assert shown.text.count("data wait") == 1
        before = len(shown.written)
        shown.resize(60, 20)
        live.do(live.bench.report_step(2))
        shown.wait_for(lambda: "step 3/40" in shown.text)
        # Drawn over itself: nothing is erased in between.
        assert b"\x1b[2J" not in shown.written[before:]
        shown.press(b"\x03")
        assert shown.end() == 0
        # Back from the second screen, with the cursor, and the last that was seen.
        assert b"\x1b[?1049l" in shown.written
        assert shown.written.rindex(b"\x1b[?25h") > shown.written.rindex(b"\x1b[?25l")
        assert "step 3/40" in shown.text
        assert "Traceback" not in shown.text


@pytest.mark.slow
def test_a_watch_waits_for_a_controller_that_is_silent_and_ends_with_the_run(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as made:
        made.do(made.bench.join_all(1))
        watching = terminal(["status", made.address, "--watch", "--interval", "0.1"])
        shown = watching.__enter__()
        shown.wait_for(lambda: "step 0/40" in shown.text)
    try:
        shown.wait_for(lambda: "no answer" in shown.text)
        assert "step 0/40" in shown.text
        shown.process.send_signal(signal.SIGTERM)
        assert shown.end() == 0
        assert b"\x1b[?1049l" in shown.written
    finally:
        watching.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_a_watch_in_a_pipe_is_a_line_a_look_until_the_run_is_drained(
    live: Served, as_json: bool
) -> None:
    command = [sys.executable, "-m", "deploy.cli", "status", live.address, "--watch"]
    command += ["--interval", "0.1", *(["--json"] if as_json else [])]
    watching = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline().rstrip("\n") for _ in range(3)]
        live.do(live.bench.loop.drain())
        lines += watching.stdout.read().splitlines()
        assert watching.wait(30) == 0
    assert len(lines) >= 4
    assert all(line.isprintable() for line in lines)
    if as_json:
        assert json.loads(lines[0])["phase"] == "running"
        assert json.loads(lines[-1])["phase"] == "drained"
    else:
        assert lines[0].startswith("step 1/40 · static")


@pytest.mark.slow
def test_packing_in_a_terminal_and_in_a_pipe(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "web.jsonl").write_text('{"text": "some words"}\n' * 3 + '{"text": "others"}\n')
    command = ["pack", "--processes", "1", str(source)]
    with terminal([*command, str(tmp_path / "shown")]) as shown:
        assert shown.end() == 0
        assert "web" in shown.text
        assert "documents" in shown.text
        assert all(len(line) <= 80 for line in shown.text.splitlines())
    piped = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *command, str(tmp_path / "piped")],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert piped.stderr == ""
    assert "\x1b" not in piped.stdout


def test_steps_are_those_that_were_decided_upon() -> None:
    status = replace(a_status(), observed_step=int(Step(2**40)))
    assert status_line(status).startswith("step 1000000/1000000 ")
