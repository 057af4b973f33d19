"""Whether a ledger is what was written: every row chained to the one before it, none missing."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from controller.ledger_file import COLUMNS, explained
from controller.ledger_prune import anchors_digest, read_anchors
from controller.ledger_schema import GENESIS, Kind, row_hash
from protos.errors import LedgerError

_TYPES = (str, int, float, str)
"""Of kind, step, time_s and body."""

_REMEDY = "restore it from a copy, or give the run another `out`"


def verify(
    database: sqlite3.Connection, path: Path, *, last: int | None = None
) -> tuple[int, bytes]:
    """Check the chain of all rows, or of the `last` ones; return the last one's number and hash.

    Raises:
        LedgerError: a row is missing, was changed, or does not follow on the one before it.
    """
    expected, head = 0, GENESIS
    with explained(f"the ledger {path} is damaged; {_REMEDY}"):
        if last is not None:
            expected, head = _before_last(database, last)
        rows = database.execute(
            f"SELECT {COLUMNS} FROM ledger WHERE seq > ? ORDER BY seq", (expected,)
        )
        num_anchors = 0
        for row in rows:
            seq, kind, prev_hash, stored = row[0], row[1], row[6], row[7]
            is_anchor = kind == Kind.ANCHOR.value
            num_anchors += is_anchor
            first = _first_of(row) if is_anchor else seq
            if first != expected + 1:
                raise _damaged(path, f"row {expected + 1} is missing")
            if prev_hash != head or not (is_anchor or stored == _hash_of(row, head)):
                raise _damaged(
                    path, f"row {seq} ({kind}, step {row[2]}) was changed after it was written"
                )
            expected, head = seq, stored
        noted = database.execute("SELECT seq, hash FROM head WHERE id = 0").fetchone()
        if num_anchors:
            _check_anchors(database, path)
    if noted != (expected, head):
        had = noted[0] if noted else "more"
        raise _damaged(path, f"it ends at row {expected}, but had {had} rows")
    return expected, head


def _damaged(path: Path, what: str) -> LedgerError:
    return LedgerError(f"the ledger {path} is damaged: {what}; {_REMEDY}")


def _hash_of(row: tuple[Any, ...], head: bytes) -> bytes:
    seq, kind, step, time_s, body, data, *_ = row
    # SQLite keeps any kind of value in any column: a changed byte may have changed that.
    if tuple(map(type, row[1:5])) != _TYPES or not isinstance(data, bytes | None):
        return b""
    return row_hash(
        prev_hash=head, seq=seq, kind=kind, step=step, time_s=time_s, body=body, data=data
    )


def _first_of(anchor: tuple[Any, ...]) -> int:
    """Return the first row that an anchor stands for; -1: it is damaged."""
    seq, body, last_hash = anchor[0], anchor[4], anchor[7]
    try:
        first = json.loads(body)["first_seq"]
    except (ValueError, KeyError, TypeError):
        return -1
    whole = isinstance(first, int) and isinstance(last_hash, bytes) and 0 < first <= seq
    return first if whole else -1


def _check_anchors(database: sqlite3.Connection, path: Path) -> None:
    """Hold all anchors against the record of the last time that rows were dropped."""
    recorded = database.execute(
        "SELECT body FROM ledger WHERE kind = ? ORDER BY seq DESC LIMIT 1", (Kind.PRUNE.value,)
    ).fetchone()
    found = anchors_digest(read_anchors(database))
    if recorded is None or json.loads(recorded[0])["anchors_sha256"] != found:
        raise _damaged(path, "rows were taken out of it that no record says were dropped")


def _before_last(database: sqlite3.Connection, last: int) -> tuple[int, bytes]:
    """Return number and hash of the row before about the `last` ones; of none: 0, `GENESIS`."""
    found = database.execute(
        "SELECT seq, hash FROM ledger WHERE seq <= (SELECT max(seq) FROM ledger) - ? "
        "ORDER BY seq DESC LIMIT 1",
        (last,),
    ).fetchone()
    return found or (0, GENESIS)
