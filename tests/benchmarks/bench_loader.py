"""Our loader and five others on the same work, taken in turns; `make bench-loader` runs it.

Eight domains of eight shards, documents log-normal with a mean of 600 tokens, uint16 ids, batches
of 16 x 1025 as torch tensors with their domains, unequal shares, one worker process, the consumer
in another, the page cache warm. Ours is the whole system with its default settings: a controller
that writes its ledger, a loader worker, a trainer that joins, takes batches of 16 out of steps of
512 sequences, and reports every step. Beside it: a step for each batch, two workers, and a policy
that learns, so that each plan waits for a report. Results are medians over the rounds, in
`build/bench/loader.json`; with them, how soon a mixture that an operator sets is obeyed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "Headrace"
SMALL_STEPS = "Headrace, a step a batch"
CASES: dict[str, dict[str, Any]] = {
    OURS: {"global_sequences": 512},
    SMALL_STEPS: {"global_sequences": 16},
    "Headrace, two workers": {"global_sequences": 512, "workers": 2},
    "Headrace, a policy that learns": {"global_sequences": 512, "policy": "odm"},
}
CHANGES: dict[str, dict[str, Any]] = {
    "trainer with steps of 100 ms": {"global_sequences": 16, "step_s": 0.1},
    "trainer with steps of 20 ms": {"global_sequences": 16, "step_s": 0.02},
    "trainer that only reads, steps of 512": {"global_sequences": 512},
    "trainer that only reads, a step a batch": {"global_sequences": 16},
}
"""Where a change of the mixture is timed."""

_CHANGE_SECONDS = 8.0
PEERS = (
    "memory map + DataLoader",
    "litdata",
    "Grain",
    "webdataset + DataLoader",
    "Mosaic Streaming",
)
FIGURES = ("tokens_per_s", "cpu_s_per_mtok", "first_batch_s", "peak_rss_mb")
_TIMEOUT_S = 900.0
_HERE = Path(__file__).resolve().parent


class Bench:
    """Starts each loader's consumer in a process of its own, in the right environment."""

    def __init__(self, *, data: Path, peers_python: Path, seconds: float) -> None:
        self._data = data
        self._peers_python = peers_python
        self._seconds = seconds

    def prepare(self, name: str) -> str:
        """Write a loader's files if they are not there; return why that failed, if it did."""
        if name in CASES:
            return self._start([*self._ours(), "prepare", str(self._data / "ours")])
        return self._start([*self._peer(), "prepare", name, str(self._data)])

    def run(self, name: str) -> dict[str, Any] | str:
        """Measure a loader once; return its figures, or why there are none."""
        result = self._data / "result.json"
        result.unlink(missing_ok=True)
        measuring = [str(self._seconds), str(result)]
        if name in CASES:
            command = [*self._ours(), "run", str(self._data / "ours"), *measuring]
            command.append(self._case(CASES[name]))
        else:
            command = [*self._peer(), "run", name, str(self._data), *measuring]
        failure = self._start(command)
        if failure:
            return failure
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures

    def change(self, case: dict[str, Any]) -> dict[str, Any] | str:
        """Return how soon an operator is obeyed, or why that could not be timed."""
        result = self._data / "change.json"
        command = [*self._ours(), "change", str(self._data / "ours"), str(_CHANGE_SECONDS)]
        failure = self._start([*command, str(result), self._case(case)])
        if failure:
            return failure
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures

    def _case(self, case: dict[str, Any]) -> str:
        path = self._data / "case.json"
        path.write_text(json.dumps(case))
        return str(path)

    def _ours(self) -> list[str]:
        return [sys.executable, "-m", "tests.benchmarks.our_loader"]

    def _peer(self) -> list[str]:
        return [str(self._peers_python), str(_HERE / "peer_loaders.py")]

    def _start(self, command: list[str]) -> str:
        # One thread for torch in every process: the work is moving bytes, not arithmetic.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                command,
                cwd=_HERE.parents[1],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return f"took more than {_TIMEOUT_S:g} s"
        except OSError as error:
            return f"cannot be started: {error}"
        if done.returncode == 0:
            return ""
        lines = done.stderr.strip().splitlines() or ["no message"]
        return f"exit {done.returncode}: {lines[-1]}"


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over a loader's rounds."""
    result: dict[str, Any] = {figure: median(each[figure] for each in rounds) for figure in FIGURES}
    result["rounds"] = len(rounds)
    result["tokens_per_s_rounds"] = [each["tokens_per_s"] for each in rounds]
    result["shares"] = rounds[-1]["shares"]
    result["cpu_s_per_mtok_by_process"] = rounds[-1]["cpu_s_per_mtok_by_process"]
    return result


def summary(measured: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> dict[str, Any]:
    """Return what `loader.json` holds."""
    everything = {name: medians(rounds) for name, rounds in measured.items() if rounds}
    best = max(
        (name for name in everything if name in PEERS),
        key=lambda name: everything[name]["tokens_per_s"],
        default=None,
    )

    def named(name: str | None) -> dict[str, Any] | None:
        if name is None or name not in everything:
            return None
        return {"name": name, **{figure: everything[name][figure] for figure in FIGURES}}

    return {"ours": named(OURS), "best_peer": named(best), "all": everything, "failed": failed}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title="One worker process, batches of 16 x 1025, medians")
    for heading in ("loader", "tokens/s", "CPU s / M tokens", "first batch s", "peak RSS MB"):
        table.add_column(heading, justify="left" if heading == "loader" else "right")
    ranked = sorted(report["all"].items(), key=lambda item: -item[1]["tokens_per_s"])
    for name, figures in ranked:
        table.add_row(
            name,
            f"{figures['tokens_per_s'] / 1e6:.1f}M",
            f"{figures['cpu_s_per_mtok']:.3f}",
            f"{figures['first_batch_s']:.2f}",
            f"{figures['peak_rss_mb']:.0f}",
        )
    console.print(table)
    ours, best = report["ours"], report["best_peer"]
    if ours and best:
        faster = ours["tokens_per_s"] / best["tokens_per_s"]
        cheaper = ours["cpu_s_per_mtok"] / best["cpu_s_per_mtok"]
        console.print(
            f"{ours['name']}: {faster:.1f} x the tokens/s of {best['name']}, the fastest other, "
            f"for {cheaper:.2f} of its CPU time a token"
        )
    for name, found in report["mixture_change"].items():
        console.print(
            f"a mixture that is set, {name}: obeyed {found['steps_after_the_request']} steps, "
            f"{found['ms_after_the_request']:.0f} ms later"
        )
    for name, reason in report["failed"].items():
        console.print(f"{name} failed: {reason}")


def main() -> int:
    """Measure and write the report; 1 if ours could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="measured in each round")
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/loader.json"))
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-bench/bin/python"))
    parser.add_argument("--only", nargs="*", help="names of the loaders to measure")
    arguments = parser.parse_args()
    console = Console()
    data = arguments.data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        data=data,
        # Not resolved: the link's own folder is what makes it the environment's interpreter.
        peers_python=arguments.peers_python.absolute(),
        seconds=arguments.seconds,
    )
    failed: dict[str, str] = {}
    names = [name for name in (*CASES, *PEERS) if name in (arguments.only or [name])]
    for name in names:
        console.print(f"preparing {name}")
        if failure := bench.prepare(name):
            failed[name] = failure
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names:
            if name in failed:
                continue
            result = bench.run(name)
            if isinstance(result, str):
                failed[name] = result
                continue
            measured[name].append(result)
            console.print(f"round {number + 1}: {name} {result['tokens_per_s'] / 1e6:.1f}M/s")
    report = summary(measured, failed)
    report["mixture_change"] = {}
    for name, case in CHANGES.items():
        found = bench.change(case)
        if isinstance(found, str):
            failed[f"a change of the mixture, {name}"] = found
        else:
            report["mixture_change"][name] = found
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    show(report, console)
    return 0 if report["ours"] else 1


if __name__ == "__main__":
    sys.exit(main())
