"""`headrace export`: what is read from a ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.exits import stderr, told

SourceArgument = Annotated[
    Path, typer.Argument(metavar="LEDGER_OR_RUN", help="A ledger, or the folder of a run.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@told
def export(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder to make; must not be there yet.")],
    tables: Annotated[
        str | None,
        typer.Option(help="With commas, or `all`. Default: all but `alignment` and `cursors`."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a ledger as Parquet: OUT/steps, OUT/observations, OUT/plans and so on.

    Read them with DuckDB, pyarrow, pandas or Polars; each column's unit is in its metadata and in
    deploy/docs/reading-the-ledger.md. Works while the run goes on, of any length in little memory.
    Exit code 5 if the ledger is damaged.
    """
    from deploy.reading.export import choose_tables, export

    wanted = choose_tables(tables)
    with stderr.status("checking the ledger") as status:
        exported = export(
            source,
            out,
            tables=wanted,
            progress=lambda row, num_rows: status.update(f"exporting: row {row:,} of {num_rows:,}"),
        )
    if as_json:
        print(json.dumps(exported.as_json(), indent=2))
        return
    table = Table("table", "rows")
    table.columns[1].justify = "right"
    for name, num_rows in exported.tables.items():
        table.add_row(name, f"{num_rows:,}")
    Console().print(table)
