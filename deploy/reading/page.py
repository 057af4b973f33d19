"""`headrace report`: a run on one HTML page that opens anywhere, with no network and no script."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.reading.curves import Array, Curves, mean, read_curves
from deploy.reading.svg import areas, heat_map, lines, printable
from deploy.record import ledger_of
from deploy.report import REPORT
from deploy.whole_file import write_whole

PAGE = "report.html"
MOST_DOMAINS = 20
"""Domains with curves of their own: those with the most tokens."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
td { overflow-wrap: anywhere }
svg { width: 100%; height: auto }
svg text { font-size: 12px; fill: currentColor }
.grid { stroke: var(--line) }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
.legend { list-style: none; padding: 0; margin: .2rem 0 }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem }
.legend li { overflow-wrap: anywhere }
.scroll { overflow-x: auto } small { color: var(--soft) } .bad { color: #d33; font-weight: 600 }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is fetched and nothing is run, whatever a name holds."""


def write_report_page(source: Path, out: Path | None = None) -> Path:
    """Write a run's page; return where it is.

    Args:
        source: the ledger, or the folder of a run.
        out: the file. None: report.html beside the ledger.

    Raises:
        LedgerError: the ledger is missing or damaged.
    """
    ledger = ledger_of(source)
    curves = read_curves(ledger)
    path = out or ledger.with_name(PAGE)
    write_whole(path, "".join(_page(curves, _report(ledger.with_name(REPORT)))))
    return path


def _report(path: Path) -> dict[str, Any]:
    """Return what report.json says, which `headrace run` leaves beside the ledger."""
    if not path.is_file():
        return {}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _page(curves: Curves, report: dict[str, Any]) -> Iterator[str]:
    title = printable(f"{curves.run}: {curves.policy}")
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
    yield _table(["", ""], _summary(curves, report))
    if curves.num_steps:
        yield "<h2>Domains</h2>"
        head = ["domain", "share first", "share last", "sequences", "tokens", "loss first"]
        yield _table([*head, "loss last"], _domain_rows(curves))
        yield from _plots(curves)
    if curves.num_quarantines:
        yield f"<h2>Left out of the data: {curves.num_quarantines:,}</h2>"
        rows = (
            [one.domain, one.shard, _sample(one.sample), one.reason] for one in curves.quarantines
        )
        yield _table(["domain", "shard", "sample", "reason"], rows)
    if curves.events:
        yield f"<h2>What happened: {sum(curves.num_events.values()):,}</h2>"
        counts = ", ".join(f"{name} {count:,}" for name, count in curves.num_events.most_common(20))
        yield f"<p>{printable(counts)}</p>"
        yield _table(["time (UTC)", "step", "what", "details"], _event_rows(curves))
    yield "</main></body></html>"


def _summary(curves: Curves, report: dict[str, Any]) -> Iterator[list[str]]:
    tokens = curves.tokens.sum()
    step_s = curves.times["step_s"].sum()
    yield ["steps", f"{curves.num_steps:,}"]
    yield ["tokens", f"{tokens:,.0f}"]
    yield ["plans", f"{curves.num_plans:,}"]
    if step_s > 0:
        yield ["tokens/s", f"{tokens / step_s:,.0f}"]
        for name, words in (("data_wait_s", "waited for data"), ("probe_s", "in the probe")):
            yield [
                f"{words}, of the slowest rank's time",
                f"{curves.times[name].sum() / step_s:.2%}",
            ]
    yield [
        "mean decision",
        f"{curves.times['decision_ms'].sum() / max(curves.num_steps, 1):.1f} ms",
    ]
    for name, number in (
        ("degraded steps", curves.degraded.sum()),
        ("missing reports", curves.missing.sum()),
        ("steps trained again", curves.num_superseded),
        ("left out of the data", curves.num_quarantines),
    ):
        yield [name, f"{number:,.0f}"]
    for name in ("lost", "duplicated", "mismatched", "misordered", "plans_obeyed"):
        if name in report:
            yield [f"{name.replace('_', ' ')} (held against the shards)", str(report[name])]
    yield ["rows of the ledger, chain of hashes intact", f"{curves.num_rows:,}"]


def _domain_rows(curves: Curves) -> Iterator[list[str]]:
    known = np.flatnonzero(curves.count)
    shares, losses = curves.shares[known], curves.loss
    for index in _by_tokens(curves):
        seen = losses[np.isfinite(losses[:, index]), index]
        first, last = (seen[0], seen[-1]) if len(seen) else (math.nan, math.nan)
        yield [
            curves.domains[index],
            f"{shares[0, index]:.2%}",
            f"{shares[-1, index]:.2%}",
            f"{curves.sequences[:, index].sum():,.0f}",
            f"{curves.tokens[:, index].sum():,.0f}",
            _number(first),
            _number(last),
        ]


def _plots(curves: Curves) -> Iterator[str]:
    x, shown = curves.steps, _by_tokens(curves)[:MOST_DOMAINS]
    names = [curves.domains[index] for index in shown]
    rest = [index for index in range(len(curves.domains)) if index not in set(shown)]

    def chosen(values: Array) -> dict[str, Array]:
        return dict(zip(names, values[:, shown].T, strict=True))

    stacked = chosen(curves.shares)
    given = chosen(curves.realised)
    if rest:
        other = f"{len(rest)} other domains"
        stacked[other] = curves.shares[:, rest].sum(axis=1)
        given[other] = curves.realised[:, rest].sum(axis=1)
    yield areas(x, stacked, "The mixture that the plans gave")
    yield areas(x, given, "The mixture that was delivered")
    yield lines(x, chosen(curves.loss), "Training loss of each domain", unit="nats a token")
    away = curves.realised - curves.shares
    largest = np.nanmax(np.where(np.isnan(away), 0, np.abs(away)), axis=1)
    known = np.where(curves.count > 0, largest, np.nan)
    title = "Delivered less planned share, largest of all domains"
    yield lines(x, {"largest": known}, title, unit="", percent=True)
    step_s = curves.times["step_s"]
    waits = {
        "data wait": mean(curves.times["data_wait_s"], step_s),
        "probe": mean(curves.times["probe_s"], step_s),
    }
    yield lines(x, waits, "Share of the slowest rank's time", unit="", percent=True)
    speed = {"tokens/s": mean(curves.tokens.sum(axis=1), step_s)}
    yield lines(x, speed, "Tokens a second, by the slowest rank", unit="")
    decisions = {"decision": mean(curves.times["decision_ms"], curves.count)}
    yield lines(x, decisions, "Time that a decision took", unit="ms")
    trouble = {"degraded steps": curves.degraded, "missing reports": curves.missing}
    if curves.degraded.any() or curves.missing.any():
        yield lines(x, trouble, "Trouble", unit="steps or reports in a point")
    shadows = {name: mean(*sums) for name, sums in curves.shadows.items()}
    yield lines(x, shadows, "How far shadow policies are from the decision", unit="", percent=True)
    for name, sums in curves.figures.items():
        words = name.replace("_", " ")
        yield lines(x, {words: mean(*sums)}, f"{curves.policy}: {words}", unit="")
    for quarter, products in curves.alignment.items():
        words = f"How far the domains' gradients agree (cosines), {quarter} quarter"
        yield heat_map(_cosines(products), curves.domains, words)


def _by_tokens(curves: Curves) -> list[int]:
    order: list[int] = np.argsort(-curves.tokens.sum(axis=0), kind="stable").tolist()
    return order


def _cosines(products: Array) -> Array:
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    scale = np.outer(norms, norms)
    return mean(products, scale)


def _event_rows(curves: Curves) -> Iterator[list[str]]:
    for time_s, step, kind, detail in curves.events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s))
        told = ", ".join(f"{name} {_short(value)}" for name, value in detail.items())
        yield [when, str(step) if step >= 0 else "", kind, told]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _sample(sample: int) -> str:
    return "all" if sample < 0 else str(sample)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    """Return a table; cells are any text."""
    cells = "".join(f"<th scope='col'>{printable(name)}</th>" for name in head)
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{printable(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table>{top}<tbody>{body}</tbody></table></div>"
