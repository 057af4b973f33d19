"""The tables of comparisons that were run once and kept: `python -m tests.learning.evidence_table`.

Writes `table.txt` beside each comparison's records.
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from deploy.compare.record import read_records
from deploy.compare.spec import load_spec
from deploy.compare.summary import summarise
from deploy.compare.table import print_results

EVIDENCE = Path(__file__).with_name("evidence")
TABLE = "table.txt"


def comparisons() -> list[Path]:
    """Return the folders of the comparisons that were kept."""
    return sorted(path.parent for path in EVIDENCE.glob("*/compare.yaml"))


def rendered(folder: Path) -> str:
    """Return a comparison's tables and verdict, from its records alone."""
    results = summarise(load_spec(folder / "compare.yaml"), read_records(folder))
    screen = io.StringIO()
    print_results(results, Console(file=screen, width=80, color_system=None))
    return "".join(line.rstrip() + "\n" for line in screen.getvalue().splitlines())


if __name__ == "__main__":
    for found in comparisons():
        (found / TABLE).write_text(rendered(found))
        print(found / TABLE)
