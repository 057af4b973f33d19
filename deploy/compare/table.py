"""The comparison on screen, in 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.compare.curves import MACRO, NATURAL, REGRET, WORST
from deploy.compare.statistics import Estimate

Json = dict[str, Any]


def print_results(results: Json, console: Console) -> None:
    """Print three tables and the verdict."""
    for table in (losses_table(results), differences_table(results), conduct_table(results)):
        console.print(table)
    for sentence in results["verdict"]:
        console.print(f"- {sentence}", markup=False, highlight=False)


def losses_table(results: Json) -> Table:
    """Return the final test losses: means over seeds, with standard deviations."""
    table = _table("final test loss, nats a token (± sd over seeds)")
    for name in ("arm", "seeds", "mean", "natural", "worst", "regret"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm, values in results["arms"].items():
        final = values["final"]
        table.add_row(
            arm,
            str(len(values["seeds"])),
            _with_sd(final[MACRO]),
            _with_sd(final[NATURAL]),
            _number(final[WORST], 3),
            _number(final[REGRET], 3, sign=True),
        )
    return table


def differences_table(results: Json) -> Table:
    """Return the paired differences to the static controls, and where their values are reached."""
    table = _table(
        "less a static control's, ± half the interval (* without 0), and the share of the steps "
        "after which its final value is reached"
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("uniform, mean", justify="right", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("natural, natural", justify="right", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    for arm, values in results["arms"].items():
        cells = []
        for control, metric in (("uniform", MACRO), ("natural", NATURAL)):
            paired = results["paired"][metric][arm].get(control)
            cells += [_difference(paired), _share(values["reached"].get(f"{control} {metric}"))]
        table.add_row(arm, *cells)
    return table


def conduct_table(results: Json) -> Table:
    """Return how the policies behaved and what they cost."""
    table = _table("conduct and cost")
    for name in ("arm", "entropy", "epochs", "SNR", "foresight", "crit. EV", "cpu s", "decide ms"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm, values in results["arms"].items():
        explained = values["diagnostics"].get("critic_explained_variance")
        table.add_row(
            arm,
            f"{values['mixture']['entropy']:.3f}",
            f"{max(values['epochs']):.2f}",
            _plain(values["reward"]["signal_to_noise"]),
            _plain(values["reward"]["foresight"]),
            _plain(explained),
            f"{values['time']['cpu_s']:.0f}",
            f"{values['time']['decide_ms_p50']:.1f}",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(found: Json | None, digits: int, *, sign: bool = False) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:{'+' if sign else ''}.{digits}f}"


def _with_sd(found: Json | None) -> str:
    if found is None:
        return "-"
    value = Estimate(**found)
    return f"{value.mean:.4f}" + (f" ±{value.sd:.4f}" if value.sd is not None else "")


def _difference(found: Json | None) -> str:
    if found is None:
        return "-"
    text = f"{found['mean']:+.3f}"
    if found["low"] is None:
        return text
    half = (found["high"] - found["low"]) / 2
    return f"{text} ±{half:.3f}{'*' if found['excludes_zero'] else ' '}"


def _share(reached: Json | None) -> str:
    if not reached or not reached["by_seed"]:
        return "-"
    num, never = len(reached["by_seed"]), reached["never"]
    if never == num:
        return "never"
    text = f"{reached['share_of_steps']['mean']:.0%}"
    return f"{text} ({num - never}/{num})" if never else text
