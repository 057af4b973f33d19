"""How a run goes, live: a table in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from protos.status import RunStatus

LINE_EVERY_S = 5.0
_BAR_CELLS = 24
_SHADOW_DOMAINS = 4


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
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Say what is being done, and how long it took."""
        if self._console.is_terminal:
            with self._console.status(what):
                started = self._now()
                yield
        else:
            started = self._now()
            yield
        self.say(f"{what}: {self._now() - started:.1f} s")

    def show(self, status: RunStatus) -> None:
        """Show how the run stands, and say which workers came and went."""
        self._say_changes(status)
        self._last_status = status
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(status_panel(status))
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


def status_line(status: RunStatus) -> str:
    """Return a status in a line."""
    mixture = " ".join(
        f"{domain} {share:.0%}"
        for domain, share in zip(status.domains, status.mixture.shares, strict=True)
    )
    losses = [loss for loss in status.loss if math.isfinite(loss)]
    loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"
    return (
        f"step {_steps_done(status)}/{status.num_steps} · {status.policy} {status.policy_phase}"
        f" · loss {loss} · {status.tokens_per_s:,.0f} tokens/s · {mixture}"
    )


def status_panel(status: RunStatus) -> Group:
    """Return a status as a table with a bar for each domain."""
    head = Text.assemble(
        (f" {status.run_id} ", "bold"),
        f" step {_steps_done(status)}/{status.num_steps}   ",
        (f"{status.policy}: {status.policy_phase}", "cyan"),
        f"   {status.tokens_per_s:,.0f} tokens/s   {status.tokens:,} tokens   ",
        f"data wait {status.data_wait_share:.1%}",
    )
    domains = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1))
    domains.add_column("domain")
    domains.add_column("share", justify="right")
    domains.add_column("", width=_BAR_CELLS)
    domains.add_column("loss", justify="right")
    largest = max(status.mixture.shares)
    for domain, share, loss in zip(status.domains, status.mixture.shares, status.loss, strict=True):
        bar = "█" * round(_BAR_CELLS * share / largest)
        shown = f"{loss:.3f}" if math.isfinite(loss) else "-"
        domains.add_row(domain, f"{share:.1%}", Text(bar, style="green"), shown)
    parts: list[Text | Table] = [head, domains, _workers_line(status)]
    if status.shadows:
        parts.append(_shadows_table(status))
    return Group(*parts)


def _shadows_table(status: RunStatus) -> Table:
    """Return what shadow policies would give the domains that they would give most."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1))
    table.add_column("shadow")
    table.add_column("phase")
    table.add_column("would give")
    for shadow in status.shadows:
        shares = zip(shadow.shares, status.domains, strict=bool(shadow.shares))
        largest = sorted(shares, key=lambda pair: -pair[0])[:_SHADOW_DOMAINS]
        wanted = " ".join(f"{domain} {share:.1%}" for share, domain in largest)
        table.add_row(shadow.name, shadow.phase, Text(shadow.fault or wanted or "-"))
    return table


def _workers_line(status: RunStatus) -> Text:
    line = Text(" ")
    for worker in status.workers:
        if worker.leaving and not worker.alive:
            continue
        style = "green" if worker.alive else "red"
        lanes = ",".join(map(str, worker.lanes))
        line.append(f"● {worker.worker_id} ", style=style)
        line.append(f"lanes {lanes or 'none'}  {worker.sequences_served:,} sequences   ")
        if worker.leaving:
            line.append("leaving   ", style="yellow")
    trouble = {
        "degraded steps": status.degraded_steps,
        "missing reports": status.missing_reports,
        "held decisions": status.held_decisions,
        "quarantined": len(status.quarantines),
    }
    for name, number in trouble.items():
        if number:
            line.append(f"{name}: {number}   ", style="yellow")
    if status.frozen:
        line.append("mixture held by an operator   ", style="yellow")
    if status.ledger_fault:
        line.append(f"nothing is decided: {status.ledger_fault}", style="red")
    return line


def _steps_done(status: RunStatus) -> int:
    return min(status.observed_step + 1, status.num_steps)
