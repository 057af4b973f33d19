"""A ledger's head: number and hash of its last row. Who keeps one elsewhere can tell a rollback.

The chain of hashes shows that rows were changed or taken out of the middle, not that the end was
cut off or that all of it was written anew. Ranks get the head with the answers to their reports and
keep it in their checkpoints; `headrace verify --head` holds a ledger against one.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

from controller.ledger_file import explained
from controller.ledger_schema import GENESIS
from protos.errors import ConfigError, LedgerError

_HEAD = re.compile(r"(\d{1,18}):([0-9a-f]{64})")


def head_text(seq: int, row_hash: bytes) -> str:
    """Return a head as `ROW:HASH`, the hash in hexadecimal digits."""
    return f"{seq}:{row_hash.hex()}"


def hold_against_head(database: sqlite3.Connection, path: Path, head: str) -> None:
    """Check that a ledger, whose own chain is checked elsewhere, has the row that `head` names.

    Raises:
        ConfigError: `head` is none, or its row was dropped by `ledger.keep_steps`.
        LedgerError: the ledger was rolled back, or is another one.
    """
    found = _HEAD.fullmatch(head.strip())
    if found is None:
        raise ConfigError(
            f"a ledger's head is ROW:HASH, a number and 64 hexadecimal digits, got {head[:100]!r}"
        )
    row, wanted = int(found[1]), bytes.fromhex(found[2])
    with explained(f"the ledger {path} is damaged"):
        (last,) = database.execute("SELECT coalesce(max(seq), 0) FROM ledger").fetchone()
        stored = database.execute("SELECT hash FROM ledger WHERE seq = ?", (row,)).fetchone()
    if row > last:
        raise LedgerError(
            f"the ledger {path} ends at row {last}, but had row {row} when the head was taken: it "
            "was rolled back to an older state, or is another one; restore it from a copy"
        )
    if row and stored is None:
        raise ConfigError(
            f"row {row} of {path} was dropped since (ledger.keep_steps): give a newer head"
        )
    if (stored[0] if stored else GENESIS) != wanted:
        raise LedgerError(
            f"row {row} of the ledger {path} is not the one that the head was taken of: from there "
            "on or before, it was written anew, or it is another ledger; restore it from a copy"
        )
