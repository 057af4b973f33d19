"""`headrace explain`: what was seen at a step, what was proposed, and what was made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from controller.explanation import explain_step
from deploy.exits import told
from deploy.record import ledger_of

OutArgument = Annotated[Path, typer.Argument(help="Folder of a run, or its ledger.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print all of it as JSON on stdout.")]


@told
def explain(
    out: OutArgument,
    step: Annotated[int, typer.Argument(min=0, help="The step that was observed.")],
    as_json: JsonOption = False,
) -> None:
    """Explain a decision: what a step showed, what the policy proposed, what the guard changed.

    Also the plan that came of it, and what shadow policies would have done. Works while the run
    goes on.
    """
    explanation = explain_step(ledger_of(out), step)
    if as_json:
        print(json.dumps(explanation, indent=2))
    else:
        _show(explanation)


def _show(explanation: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    policy, decision = explanation["policy"], explanation["decision"]
    seen, plan, shadows = (
        explanation["observation"],
        explanation["plan"],
        explanation["shadows"],
    )
    head = f"step {explanation['step']}, generation {explanation['generation']}"
    if seen["missing_ranks"]:
        head += f", without {seen['missing_ranks']} ranks' reports"
    console.print(head)
    console.print(f"policy {policy['name']} ({policy['phase'] or 'was not asked'})")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("domain")
    columns = ["planned", "sequences", "loss", "proposed", "decided", *shadows]
    for name in columns:
        table.add_column(name, justify="right")
    for domain, row in seen["domains"].items():
        cells = [
            _percent(row["planned"]),
            str(row["sequences"]),
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            _percent((policy["proposal"] or {}).get(domain)),
            _percent((decision["mixture"] or {}).get(domain)),
            *(_percent((shadow["proposal"] or {}).get(domain)) for shadow in shadows.values()),
        ]
        table.add_row(domain, *cells)
    console.print(table)
    for name, value in policy["diagnostics"].items():
        console.print(f"{name.replace('_', ' ')}: {value:.6g}")
    for reason in decision["reasons"] or ["the proposal was not changed"]:
        console.print(reason, soft_wrap=True, markup=False)
    for name, shadow in shadows.items():
        if shadow["fault"]:
            console.print(f"shadow {name}: {shadow['fault']}", soft_wrap=True, markup=False)
    if plan is not None and policy["proposed_step"] is not None:
        since = "from then on" if plan["is_new"] else f"since step {plan['first_step']}"
        console.print(
            f"so step {policy['proposed_step']} has plan {plan['version']}, in force {since}"
        )


def _percent(share: Any) -> str:
    return f"{share:.2%}" if isinstance(share, float | int) else str(share or "-")
