"""A ledger's file: which versions can be read, what is said of its errors, what is on the disk."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from controller.ledger_schema import OLDEST_VERSION, SCHEMA_VERSION
from protos.errors import LedgerError

COLUMNS = "seq, kind, step, time_s, body, data, prev_hash, hash"


def forget_cached(path: Path) -> None:
    """Have the next read come from the disk: after an error the cache may hold what it does not."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_version(version: int, path: Path) -> None:
    """Refuse a ledger that this program cannot read.

    Raises:
        LedgerError: it is newer than the program, or no ledger.
    """
    if not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        raise LedgerError(
            f"the ledger {path} has schema version {version}, this program knows versions "
            f"{OLDEST_VERSION} to {SCHEMA_VERSION}; use the program that wrote it, or another `out`"
        )


@contextlib.contextmanager
def explained(sentence: str) -> Iterator[None]:
    """Have what SQLite says of a file follow on `sentence`, as a LedgerError."""
    try:
        yield
    except (sqlite3.Error, OSError, OverflowError, UnicodeDecodeError) as error:
        raise LedgerError(f"{sentence}: {error}") from error
