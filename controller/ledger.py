"""The durable, append-only record of a run: SQLite, one writer, rows chained by hash."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from controller.ledger_schema import (
    CREATE,
    CREATE_NEWEST,
    GENESIS,
    SCHEMA_VERSION,
    Entry,
    Kind,
    Row,
    encode_body,
    row_hash,
)
from protos.errors import AlreadyServing, LedgerError

CHECKED_AT_OPENING = 20_000
"""Rows whose chain is checked when a ledger is opened to be written, from the last one back: so
many that a run of a few thousand steps is checked whole, so few that a long one opens at once.
`headrace verify` checks every row."""

_COLUMNS = "seq, kind, step, time_s, body, data, prev_hash, hash"


class LedgerLock:
    """Held by the one process that may write a ledger; the system frees it when that dies."""

    def __init__(self, ledger: Path) -> None:
        """Take the lock.

        Raises:
            AlreadyServing: another process has it.
            LedgerError: the lock file cannot be made.
        """
        self.path = ledger.with_name(ledger.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: int | None = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            raise LedgerError(f"cannot lock the ledger {ledger}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
            self.close()
            raise AlreadyServing(
                f"the ledger {ledger} is held by process {holder or 'unknown'}; stop that "
                "controller first, or give this run another `out`"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the lock back; twice does no harm."""
        # The file stays: removing it would let two processes lock two files of one name.
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Ledger:
    """A ledger, open to be written. Calls block, and come from one thread at a time."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Open or begin a ledger, and check its last `CHECKED_AT_OPENING` rows.

        Raises:
            AlreadyServing: another process has it open.
            LedgerError: it is damaged, of another version, or cannot be written.
        """
        self.path = path
        self._now = now
        self._lock = LedgerLock(path)
        self._database: sqlite3.Connection | None = None
        try:
            self._database = self._connect()
            self._seq, self._hash = verify(self._database, path, last=CHECKED_AT_OPENING)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self._seq

    def commit(self, entries: Sequence[Entry]) -> None:
        """Append all of `entries` or none; when it returns, they survive a loss of power.

        Raises:
            LedgerError: they could not be written; nothing of them is there.
        """
        if not entries:
            return
        database = self._open()
        seq, head, rows = self._seq, self._hash, []
        for entry in entries:
            seq += 1
            fields = {
                "seq": seq,
                "kind": entry.kind.value,
                "step": int(entry.step),
                "time_s": self._now(),
                "body": encode_body(entry.body),
                "data": entry.data,
            }
            following = row_hash(prev_hash=head, **fields)  # type: ignore[arg-type]
            rows.append((*fields.values(), head, following))
            head = following
        with _explained(f"cannot write to the ledger {self.path}"), database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(
                f"INSERT INTO ledger ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            database.execute("UPDATE head SET seq = ?, hash = ? WHERE id = 0", (seq, head))
        self._seq, self._hash = seq, head

    def rows(
        self,
        *kinds: Kind,
        min_step: int | None = None,
        max_step: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Row]:
        """Yield the rows of some kinds (none given: all), in the order of step, then age.

        Without a bound on the step they come in the order in which they were written.
        """
        return read_rows(
            self._open(),
            *kinds,
            min_step=min_step,
            max_step=max_step,
            newest_first=newest_first,
        )

    def newest(self, kind: Kind) -> Row | None:
        """Return the row of a kind that was written last; None: there is none."""
        return next(self.rows(kind, newest_first=True), None)

    def close(self) -> None:
        """Close the file and give the lock back; twice does no harm."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._lock.close()

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            raise LedgerError(f"the ledger {self.path} is closed")
        return self._database

    def _connect(self) -> sqlite3.Connection:
        with _explained(f"cannot open the ledger {self.path}"):
            # Threads are the caller's affair; statements are grouped by hand.
            database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")
                self._check_version(database)
            except BaseException:
                database.close()
                raise
            return database

    def _check_version(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (num_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if num_tables == 0:
            database.executescript(
                f"BEGIN IMMEDIATE; {CREATE} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {self.path} has schema version {version}, this program writes "
                f"version {SCHEMA_VERSION}; use the program that wrote it, or another `out`"
            )
        # Ledgers of before it was part of the schema get it here.
        database.execute(CREATE_NEWEST)


def read_rows(
    database: sqlite3.Connection,
    *kinds: Kind,
    min_step: int | None = None,
    max_step: int | None = None,
    newest_first: bool = False,
) -> Iterator[Row]:
    """Yield rows of a ledger; see `Ledger.rows`."""
    clauses: list[str] = []
    values: list[Any] = []
    if kinds:
        clauses.append(f"kind IN ({', '.join('?' * len(kinds))})")
        values += [kind.value for kind in kinds]
    for bound, compare in ((min_step, ">="), (max_step, "<=")):
        if bound is not None:
            clauses.append(f"step {compare} ?")
            values.append(bound)
    where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
    by_step = min_step is not None or max_step is not None
    direction = "DESC" if newest_first else "ASC"
    order = f"step {direction}, seq {direction}" if by_step else f"seq {direction}"
    query = f"SELECT seq, kind, step, time_s, body, data FROM ledger {where} ORDER BY {order}"
    with _explained("cannot read the ledger"):
        for seq, kind, step, time_s, body, data in database.execute(query, values):
            yield Row(
                seq=seq,
                kind=Kind(kind),
                step=step,
                time_s=time_s,
                body=json.loads(body),
                data=data,
            )


@contextlib.contextmanager
def reading_ledger(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a ledger only to read it, also while a controller writes; for `read_rows`, `verify`.

    All reads see the ledger as it was when it was opened.

    Raises:
        LedgerError: it is missing or no ledger of this version.
    """
    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    with _explained(f"cannot read the ledger {path}"):
        database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None
        )
    with contextlib.closing(database):
        with _explained(f"cannot read the ledger {path}"):
            # One transaction, so that all is read as it was at one moment.
            database.execute("BEGIN")
            (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {path} has schema version {version}, this program reads version "
                f"{SCHEMA_VERSION}"
            )
        yield database


def verify(
    database: sqlite3.Connection, path: Path, *, last: int | None = None
) -> tuple[int, bytes]:
    """Check the chain of all rows, or of the `last` ones; return the last one's number and hash.

    Raises:
        LedgerError: a row is missing, was changed, or does not follow on the one before it.
    """
    remedy = "restore it from a copy, or give the run another `out`"
    expected, head = 0, GENESIS
    with _explained(f"the ledger {path} is damaged; {remedy}"):
        if last is not None:
            expected, head = _before_last(database, last)
        rows = database.execute(
            f"SELECT {_COLUMNS} FROM ledger WHERE seq > ? ORDER BY seq", (expected,)
        )
        for row in rows:
            seq, kind, step, time_s, body, data, prev_hash, stored = row
            expected += 1
            if seq != expected:
                raise LedgerError(
                    f"the ledger {path} is damaged: row {expected} is missing; {remedy}"
                )
            computed = row_hash(
                prev_hash=head, seq=seq, kind=kind, step=step, time_s=time_s, body=body, data=data
            )
            if prev_hash != head or stored != computed:
                raise LedgerError(
                    f"the ledger {path} is damaged: row {seq} ({kind}, step {step}) was changed "
                    f"after it was written; {remedy}"
                )
            head = computed
        noted = database.execute("SELECT seq, hash FROM head WHERE id = 0").fetchone()
    if noted != (expected, head):
        raise LedgerError(
            f"the ledger {path} is damaged: it ends at row {expected}, but had "
            f"{noted[0] if noted else 'more'} rows; {remedy}"
        )
    return expected, head


def _before_last(database: sqlite3.Connection, last: int) -> tuple[int, bytes]:
    """Return number and hash of the row before the `last` ones; of none: 0 and `GENESIS`."""
    found = database.execute(
        "SELECT seq, hash FROM ledger WHERE seq = (SELECT max(seq) FROM ledger) - ?", (last,)
    ).fetchone()
    return found or (0, GENESIS)


@contextlib.contextmanager
def _explained(sentence: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        raise LedgerError(f"{sentence}: {error}") from error
