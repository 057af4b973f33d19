"""The fault suite's bookkeeping: which row of the table a test covers, and how often its fault hit.

A test says `@pytest.mark.fault_row(1, "controller killed while idle")` and tells the fixture
`record_injections` how often the fault really happened; one that passes without a single injection
is failed. `--fault-table FILE` writes the table of what ran.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_COUNT = pytest.StashKey["Injections"]()
_PROPERTY = "fault injections"
_ROW_PROPERTY = "fault row"
_OUTCOMES = pytest.StashKey[list["Outcome"]]()


@dataclass
class Injections:
    """What a test did to the processes under test."""

    count: int = 0
    notes: list[str] = field(default_factory=list)

    def __call__(self, times: int = 1, note: str = "") -> None:
        """Count a fault that was seen to have happened; `note` goes into the table."""
        self.count += times
        if note:
            self.notes.append(note)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A line of the table."""

    row: int
    fault: str
    test: str
    count: int
    notes: str
    outcome: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-table", type=Path, metavar="FILE", help="write the table of faults that ran"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = []


# Before pytest's own choice by `-m`.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("fault_row") or "tests/faults/" in item.path.as_posix():
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def record_injections(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return what a test calls with the number of faults that it has proof of."""
    injections = Injections()
    request.node.stash[_COUNT] = injections
    return injections


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield
    if item.get_closest_marker("fault_row") is None:
        return
    injections = item.stash.get(_COUNT, Injections())
    if injections.count < 1:
        pytest.fail("the test covers a fault, but recorded not one injection of it", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _note(item, report)
    return report


def _note(item: pytest.Item, report: pytest.TestReport) -> None:
    is_verdict = report.when == "call" or (report.when == "setup" and not report.passed)
    if not is_verdict:
        return
    injections = item.stash.get(_COUNT, Injections())
    for marker in item.iter_markers("fault_row"):
        row, *named = marker.args
        item.config.stash[_OUTCOMES].append(
            Outcome(
                row=row,
                fault=str(named[0]) if named else "",
                test=item.nodeid,
                count=injections.count,
                notes="; ".join(injections.notes),
                outcome=_outcome(report),
            )
        )


def _outcome(report: pytest.TestReport) -> str:
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        return f"SKIPPED: {str(reason).removeprefix('Skipped: ')}"
    return "held" if report.passed else "FAILED"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--fault-table")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(session.config.stash[_OUTCOMES]), encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if (path := terminalreporter.config.getoption("--fault-table")) is not None:
        terminalreporter.write_line(f"table of faults: {path}")


def table(outcomes: list[Outcome]) -> str:
    """Return the table in Markdown, by row of the fault matrix."""
    lines = [
        "| row | fault | test | injected | outcome |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in sorted(outcomes, key=lambda outcome: (outcome.row, outcome.test)):
        held = each.outcome + (f" ({each.notes})" if each.notes else "")
        cells = (str(each.row), each.fault, f"`{each.test}`", str(each.count), held)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    rows = {outcome.row for outcome in outcomes}
    held_rows = rows - {outcome.row for outcome in outcomes if outcome.outcome != "held"}
    total = sum(outcome.count for outcome in outcomes)
    lines += ["", f"{len(held_rows)} of {len(rows)} rows held in all tests; {total} injections."]
    return "\n".join(lines) + "\n"
