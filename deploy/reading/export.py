"""`headrace export`: a ledger as Parquet, in one pass and bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.history import read_amendments
from controller.ledger import read_rows, reading_ledger, verify
from controller.ledger_schema import Kind, Row
from controller.ledger_view import LedgerView
from deploy.reading.columns import Supersession, Taker
from deploy.reading.tables import TABLES, Table
from deploy.reading.writer import TableWriter
from deploy.record import ledger_of
from protos.errors import ConfigError, LedgerError

MANIFEST = "export.json"
_SAY_EVERY = 1000

Progress = Callable[[int, int], None]
"""Hears of how many rows of the ledger have been taken, and how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export came to."""

    ledger: Path
    ledger_rows: int
    head_sha256: str
    """Hash of the last row: says which state of the ledger this is."""

    tables: dict[str, int]
    """Rows of each."""

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "ledger": str(self.ledger),
            "ledger_rows": self.ledger_rows,
            "head_sha256": self.head_sha256,
            "tables": self.tables,
        }


def choose_tables(names: str | None) -> tuple[Table, ...]:
    """Return the tables of a list with commas; None: those by default; `all`.

    Raises:
        ConfigError: there is no such table.
    """
    if names is None:
        return tuple(table for table in TABLES if table.by_default)
    if names.strip() == "all":
        return TABLES
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = {table.name for table in TABLES}
    if not wanted or wanted - known:
        wrong = ", ".join(sorted(wanted - known)) or "nothing"
        raise ConfigError(
            f"--tables names {wrong}; an export has the tables {', '.join(sorted(known))}, or `all`"
        )
    return tuple(table for table in TABLES if table.name in wanted)


def export(
    source: Path, out: Path, *, tables: Sequence[Table], progress: Progress | None = None
) -> Exported:
    """Write a ledger's tables below `out`, which gets its name when all of it is there.

    Works while a controller writes: the export is the ledger as it was at one moment.

    Args:
        source: the ledger, or the folder of a run.
        out: folder to make.
        tables: which.
        progress: see `Progress`.

    Raises:
        LedgerError: the ledger is missing or damaged.
        ConfigError: `out` is there already.
    """
    path = ledger_of(source)
    if out.exists():
        raise ConfigError(f"{out} is there already; name a folder that is not")
    partial = out.with_name(out.name + ".partial")
    with reading_ledger(path) as database:
        num_rows, head = verify(database, path)
        run = next(read_rows(database, Kind.RUN), None)
        if run is None:
            raise LedgerError(f"the ledger {path} names no run yet; start its controller first")
        supersession = Supersession(read_rows(database, Kind.FORK))
        amendments = read_amendments(LedgerView(database))
        kinds = sorted({kind for table in tables for kind in table.sources}, key=_name)
        with _writers(partial, tables, run.body["domains"]) as writers:
            taker = Taker(writers, run.body["domains"], supersession, amendments)
            for row in _told(read_rows(database, *kinds), num_rows, progress):
                taker.take(row)
    exported = Exported(
        ledger=path,
        ledger_rows=num_rows,
        head_sha256=head.hex(),
        tables={name: writer.num_rows for name, writer in writers.items()},
    )
    text = json.dumps(exported.as_json(), indent=2) + "\n"
    (partial / MANIFEST).write_text(text, encoding="utf-8")
    partial.rename(out)
    return exported


def _told(rows: Iterator[Row], num_rows: int, progress: Progress | None) -> Iterator[Row]:
    for count, row in enumerate(rows):
        if progress is not None and count % _SAY_EVERY == 0:
            progress(row.seq, num_rows)
        yield row


@contextmanager
def _writers(
    folder: Path, tables: Sequence[Table], domains: list[str]
) -> Iterator[dict[str, TableWriter]]:
    """Open all tables; what is half written when something fails goes away."""
    shutil.rmtree(folder, ignore_errors=True)
    writers = {table.name: TableWriter(folder, table, domains) for table in tables}
    try:
        yield writers
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _name(kind: Kind) -> str:
    return kind.value
