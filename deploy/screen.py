"""A status on a screen: a panel that fits a terminal, a line elsewhere."""

from __future__ import annotations

import math

from rich.console import Group
from rich.table import Table
from rich.text import Text

from protos.status import RunStatus, WorkerStatus

PLAIN_WIDTH = 80
_MOST_IN_LINE = 8
"""Domains that a line names."""

_SHADOW_DOMAINS = 4
_MOST_WORKERS = 4
"""More than that are counted rather than named."""

_FEWEST_DOMAINS = 3
_NAME_CELLS = 24
_BAR_CELLS = 24
_OTHER_CELLS = 32
"""What share, loss and the space between the columns take."""


def printable(text: str) -> str:
    """Return text without control characters: a name may be anything, and moves no cursor."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def status_line(status: RunStatus) -> str:
    """Return a status in a line."""
    shares = sorted(zip(status.mixture.shares, status.domains, strict=True), key=_largest_first)
    if len(shares) <= _MOST_IN_LINE:
        shares = list(zip(status.mixture.shares, status.domains, strict=True))
    mixture = " ".join(f"{domain} {share:.0%}" for share, domain in shares[:_MOST_IN_LINE])
    if len(shares) > _MOST_IN_LINE:
        mixture += f" and {len(shares) - _MOST_IN_LINE} more"
    losses = [loss for loss in status.loss if math.isfinite(loss)]
    loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"
    return printable(
        f"step {steps_done(status)}/{status.num_steps} · {status.policy} {status.policy_phase}"
        f" · loss {loss} · {status.tokens_per_s:,.0f} tokens/s · {mixture}"
    )


def status_panel(
    status: RunStatus, *, width: int = PLAIN_WIDTH, height: int | None = None
) -> Group:
    """Return a status as a table with a bar for each domain.

    Args:
        status: what is shown.
        width: cells of a line; nothing is wrapped.
        height: lines that there are; the domains with the smallest shares are left out. None: all
            are shown.
    """
    head = [_first_line(status), _second_line(status)]
    tail: list[Text | Table] = [*_workers_lines(status)]
    if trouble := _trouble_line(status):
        tail.append(trouble)
    if status.ledger_fault:
        tail.append(_text(f" nothing is decided: {status.ledger_fault}", "red"))
    num_tail = len(tail)
    if status.shadows:
        tail.append(_shadows_table(status))
        num_tail += 1 + len(status.shadows)
    room = len(status.domains)
    if height is not None:
        # A line each for the head of the table, for what was left out and for the cursor.
        room = max(height - len(head) - num_tail - 3, _FEWEST_DOMAINS)
    return Group(*head, _domains_table(status, width, room), *tail)


def steps_done(status: RunStatus) -> int:
    """Return how many steps have been decided upon."""
    return min(status.observed_step + 1, status.num_steps)


def _largest_first(pair: tuple[float, str]) -> float:
    return -pair[0]


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _first_line(status: RunStatus) -> Text:
    done = steps_done(status) / status.num_steps if status.num_steps else 0.0
    line = _text(f" {status.run_id} ", "bold")
    line.append(f" step {steps_done(status):,}/{status.num_steps:,} ({done:.0%})   ", style="")
    line.append(printable(f"{status.policy}: {status.policy_phase}"), style="cyan")
    if status.phase != "running":
        line.append(f"   {status.phase}", style="yellow")
    return line


def _second_line(status: RunStatus) -> Text:
    return _text(
        f" {status.tokens_per_s:,.0f} tokens/s   {status.tokens:,} tokens   "
        f"data wait {status.data_wait_share:.1%}   ranks {status.world_size}"
    )


def _domains_table(status: RunStatus, width: int, room: int) -> Table:
    names = [printable(domain) for domain in status.domains]
    longest = min(max(map(len, names)), _NAME_CELLS)
    cells = max(min(width - longest - _OTHER_CELLS, _BAR_CELLS), 1)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1))
    table.add_column("domain", no_wrap=True, overflow="ellipsis", max_width=_NAME_CELLS)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", width=cells, no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    largest = max(status.mixture.shares)
    rows = list(zip(names, status.mixture.shares, status.loss, strict=True))
    shown = rows
    if len(rows) > room:
        kept = sorted(range(len(rows)), key=lambda index: -rows[index][1])[:room]
        shown = [rows[index] for index in sorted(kept)]
    for name, share, loss in shown:
        bar = "█" * round(cells * share / largest)
        value = f"{loss:.3f}" if math.isfinite(loss) else "-"
        table.add_row(Text(name), f"{share:.1%}", Text(bar, style="green"), value)
    if len(rows) > room:
        rest = sum(share for _, share, _ in rows) - sum(share for _, share, _ in shown)
        table.add_row(Text(f"{len(rows) - room} more", style="dim"), f"{max(rest, 0):.1%}", "", "")
    return table


def _shadows_table(status: RunStatus) -> Table:
    """Return what shadow policies would give the domains that they would give most."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 1))
    table.add_column("shadow", no_wrap=True, overflow="ellipsis")
    table.add_column("phase", no_wrap=True, overflow="ellipsis")
    table.add_column("would give", no_wrap=True, overflow="ellipsis")
    for shadow in status.shadows:
        shares = zip(shadow.shares, status.domains, strict=bool(shadow.shares))
        largest = sorted(shares, key=_largest_first)[:_SHADOW_DOMAINS]
        wanted = " ".join(f"{domain} {share:.1%}" for share, domain in largest)
        told = shadow.fault or wanted or "-"
        table.add_row(_text(shadow.name), _text(shadow.phase), _text(told))
    return table


def _workers_lines(status: RunStatus) -> list[Text]:
    workers = [worker for worker in status.workers if worker.alive or not worker.leaving]
    if len(workers) <= _MOST_WORKERS:
        return [_worker_line(worker) for worker in workers]
    num_alive = sum(worker.alive for worker in workers)
    served = sum(worker.sequences_served for worker in workers)
    line = _text(f" ● {num_alive} of {len(workers)} workers   {served:,} sequences", "green")
    bad = [worker for worker in workers if worker.is_silent or not worker.alive]
    lines = [line, *map(_worker_line, bad[:_MOST_WORKERS])]
    if len(bad) > _MOST_WORKERS:
        lines.append(_text(f" ● {len(bad) - _MOST_WORKERS} more that are silent or lost", "red"))
    return lines


def _worker_line(worker: WorkerStatus) -> Text:
    healthy = "yellow" if worker.is_silent else "green"
    line = _text(f" ● {worker.worker_id} ", healthy if worker.alive else "red")
    # First what somebody must see: the lanes may not fit.
    if worker.is_silent:
        line.append(f"silent for {worker.silent_s:.0f} s  ", style="yellow")
    elif not worker.alive:
        line.append("lost  ", style="red")
    if worker.leaving:
        line.append("leaving  ", style="yellow")
    lanes = ",".join(map(str, worker.lanes))
    line.append(f"lanes {lanes or 'none'}  {worker.sequences_served:,} sequences", style="default")
    return line


def _trouble_line(status: RunStatus) -> Text | None:
    trouble = {
        "degraded steps": status.degraded_steps,
        "missing reports": status.missing_reports,
        "held decisions": status.held_decisions,
        "quarantined": len(status.quarantines),
    }
    found = [f"{name}: {number}" for name, number in trouble.items() if number]
    if status.frozen:
        found.append("mixture held by an operator")
    return _text(" " + "   ".join(found), "yellow") if found else None
