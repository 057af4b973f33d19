"""`headrace status --watch`: a live run on a screen, again and again."""

from __future__ import annotations

import json
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from deploy.processes import StopSignals
from deploy.screen import printable, status_line, status_panel
from deploy.status_json import status_json
from protos.client import AdminClient
from protos.errors import HeadraceError, Retryable
from protos.status import RunStatus

_TIMEOUT_S = 5.0
_DRAINED = "drained"


class _Screen:
    """What a terminal shows: drawn over itself, line by line, and so without flicker."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._status: RunStatus | None = None

    def __enter__(self) -> _Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        # The screen of before is back; what was seen last stays on it.
        if self._status is not None:
            self._console.print(status_panel(self._status, width=self._console.width))

    def show(self, status: RunStatus) -> None:
        self._status = status
        self._draw(f"{time.strftime('%H:%M:%S')}   Ctrl-C ends the watch, not the run")

    def miss(self, error: HeadraceError) -> None:
        self._draw(f"{time.strftime('%H:%M:%S')}   no answer: {error}", style="yellow")

    def _draw(self, foot: str, style: str = "dim") -> None:
        width, height = self._console.size
        parts: list[RenderableType] = []
        if self._status is not None:
            parts.append(status_panel(self._status, width=width, height=height - 1))
        parts.append(Text(" " + printable(foot), style=style, no_wrap=True, overflow="ellipsis"))
        self._live.update(Group(*parts), refresh=True)


class _Lines:
    """Plain lines, one for each look."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, status: RunStatus) -> None:
        line = json.dumps(status_json(status)) if self._as_json else status_line(status)
        print(line, flush=True)

    def miss(self, error: HeadraceError) -> None:
        told = {"error": str(error)}
        line = json.dumps(told) if self._as_json else printable(f"no answer: {error}")
        print(line, flush=True)


def watch_run(admin: AdminClient, console: Console, *, interval_s: float, as_json: bool) -> None:
    """Show how a run stands every `interval_s`, until a signal comes or the run is drained.

    A controller that does not answer once it has is waited for.

    Raises:
        HeadraceError: the controller does not answer the first time, or refuses.
    """
    status = admin.status(timeout_s=_TIMEOUT_S)
    screen: _Screen | _Lines = _Lines(as_json=as_json)
    if console.is_interactive and not as_json:
        screen = _Screen(console)
    with StopSignals() as stop, screen:
        screen.show(status)
        while status.phase != _DRAINED and not stop.wait(interval_s):
            try:
                status = admin.status(timeout_s=_TIMEOUT_S)
                screen.show(status)
            except Retryable as error:
                screen.miss(error)
