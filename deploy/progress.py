"""How a run goes, live: a table in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from deploy.screen import printable, status_line, status_panel
from protos.status import RunStatus

LINE_EVERY_S = 5.0
_REFRESHES_PER_S = 4

Update = Callable[[str], None]
"""Says how far a piece of work is, in a few words."""


@contextmanager
def working(
    console: Console,
    what: str,
    *,
    line_every_s: float = LINE_EVERY_S,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """Show that work is going on, and what `update` hears of it.

    One line that is drawn again in a terminal; elsewhere (a pipe, a log, TERM=dumb) plain lines,
    at most one in `line_every_s`, without a control character.
    """
    if console.is_interactive:
        spinner = Spinner("dots", Text(what, no_wrap=True, overflow="ellipsis"))
        with Live(
            spinner, console=console, refresh_per_second=2 * _REFRESHES_PER_S, transient=True
        ):
            yield lambda told: spinner.update(
                text=Text(printable(f"{what}: {told}"), no_wrap=True, overflow="ellipsis")
            )
        return
    last = now()

    def say(told: str) -> None:
        nonlocal last
        if now() - last >= line_every_s:
            last = now()
            line = printable(f"{what}: {told}")
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    yield say


class Progress:
    """Shows statuses and says what happens; one for the whole of a run."""

    def __init__(
        self,
        console: Console,
        *,
        line_every_s: float = LINE_EVERY_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._line_every_s = line_every_s
        self._now = now
        self._last_line_s = -math.inf
        self._live: Live | None = None
        self._seen_workers: set[str] = set()
        self._lost_workers: set[str] = set()
        self._last_status: RunStatus | None = None
        self._last_said = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_live()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        shown = "\n".join(map(printable, text.splitlines()))
        self._console.print(shown, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, what: str) -> Iterator[Update]:
        """Say what is being done, how far it is, and how long it took."""
        started = self._now()
        with working(self._console, what, now=self._now) as update:
            yield update
        self.say(f"{what}: {self._now() - started:.1f} s")

    @contextmanager
    def going_on(self, what: str) -> Iterator[Update]:
        """Show how far something is that says by itself what came of it."""
        with working(self._console, what, line_every_s=self._line_every_s, now=self._now) as update:
            yield update

    def show(self, status: RunStatus) -> None:
        """Show how the run stands, and say which workers came and went."""
        self._say_changes(status)
        self._last_status = status
        if self._console.is_interactive:
            if self._live is None:
                self._live = Live(
                    console=self._console, refresh_per_second=_REFRESHES_PER_S, transient=True
                )
                self._live.start()
            width, height = self._console.size
            self._live.update(status_panel(status, width=width, height=height))
        elif self._now() - self._last_line_s >= self._line_every_s:
            self._last_line_s = self._now()
            self._last_said = status_line(status)
            self.say(self._last_said)

    def end_live(self) -> None:
        """Leave the screen to what comes next."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._last_status is not None and status_line(self._last_status) != self._last_said:
            self.say(status_line(self._last_status))
        self._last_status = None

    def _say_changes(self, status: RunStatus) -> None:
        alive = {worker.worker_id for worker in status.workers if worker.alive}
        left = {worker.worker_id for worker in status.workers if worker.leaving}
        for lost in sorted(self._seen_workers - alive - self._lost_workers - left):
            self.say(f"the controller has lost loader worker {lost}")
        for back in sorted(alive & self._lost_workers):
            self.say(f"the controller has loader worker {back} again")
        self._seen_workers = (self._seen_workers | alive) - (left - alive)
        self._lost_workers = self._seen_workers - alive
