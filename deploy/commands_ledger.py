"""`headrace export`, `replay` and `report`: what is read from a ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.exits import stderr, told
from deploy.progress import working

_FAULTY = 4

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
    with working(stderr, "exporting") as update:
        exported = export(
            source,
            out,
            tables=wanted,
            progress=lambda row, num_rows: update(
                f"row {row:,} of {num_rows:,} ({row / max(num_rows, 1):.0%})"
            ),
        )
    if as_json:
        print(json.dumps(exported.as_json(), indent=2))
        return
    table = Table("table", "rows")
    table.columns[1].justify = "right"
    for name, num_rows in exported.tables.items():
        table.add_row(name, f"{num_rows:,}")
    Console().print(table)


@told
def replay(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder to make; must not be there yet.")],
    steps: Annotated[
        str, typer.Option(help="A:B, from step A up to but without step B; or one step.")
    ],
    form: Annotated[
        str, typer.Option("--format", help="digests, npz (a file a step) or webdataset.")
    ] = "digests",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of token shards. Default: the run's own, or one for now."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the batches of any steps again, byte for byte, from the ledger and the dataset index.

    No policy is run: the logged plans are. Only the data in which the steps lie is read. Says which
    steps ranks had another plan in than the ledger has; those may differ, and the exit code is 4.
    """
    import tempfile

    from deploy.local import CACHE
    from deploy.reading.replay import Replay, parse_steps
    from deploy.reading.replay_files import writing

    first, end = parse_steps(steps)
    own = source / CACHE
    with tempfile.TemporaryDirectory(prefix="headrace-replay-") as temporary:
        folder = cache or (own if own.is_dir() else Path(temporary))
        with (
            Replay(source, first=first, end=end, cache=folder) as replayed,
            writing(out, form, replayed.spec.domains) as sink,
            working(stderr, "replaying") as update,
        ):
            for step in replayed:
                sink.write(step)
                update(f"step {step.step}, to {replayed.steps[-1]}")
    result = {
        "first_step": replayed.steps.start,
        "end_step": replayed.steps.stop,
        "sequences": len(replayed.steps) * replayed.spec.global_sequences,
        "otherwise": replayed.otherwise,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['sequences']:,} sequences of {len(replayed.steps):,} steps are in {out}")
        for number in replayed.otherwise:
            print(f"step {number}: ranks had another plan than the ledger has")
    if replayed.otherwise:
        raise typer.Exit(_FAULTY)


@told
def report(
    source: SourceArgument,
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html beside the ledger.")
    ] = None,
) -> None:
    """Draw a run on one HTML page: mixture, losses, alignment, waits, decisions, events.

    The page holds all that it needs: no network, no script. Works while the run goes on, and for
    ledgers of any length. Exit code 5 if the ledger is damaged.
    """
    from deploy.reading.page import write_report_page

    with working(stderr, "reading the ledger"):
        path = write_report_page(source, out)
    Console().print(f"{path}", soft_wrap=True, highlight=False, markup=False)
