"""The durable, append-only record of a run: SQLite, one writer, rows chained by hash."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from controller.ledger_file import COLUMNS, check_version, explained, forget_cached
from controller.ledger_head import head_text
from controller.ledger_lock import LedgerLock
from controller.ledger_prune import prune
from controller.ledger_schema import (
    CREATE,
    CREATE_NEWEST,
    OLDEST_VERSION,
    SCHEMA_VERSION,
    UPGRADES,
    Entry,
    Kind,
    Row,
    encode_body,
    row_hash,
)
from controller.ledger_verify import verify as verify
from protos.errors import AlreadyServing, LedgerError
from protos.failpoints import Failpoint

_IN_TRANSACTION = Failpoint("ledger.rows", "after rows are written, before they are committed")

CHECKED_AT_OPENING = 20_000
"""Rows whose chain is checked when a ledger is opened to be written, from the last one back: so
many that a run of a few thousand steps is checked whole, so few that a long one opens at once.
`headrace verify` checks every row."""


class Unsettled(Exception):
    """A commit failed, and whether it is in the ledger cannot be told yet. Never leaves here."""


class Ledger:
    """A ledger, open to be written. Calls block, and come from one thread at a time.

    After an error of the disk nothing is tried again on the same connection: what it believes to be
    there need not be. `settle` opens the file anew, reads it from the disk, and says whether the
    commit is in it. Where a disk is merely full, SQLite has taken the commit back.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Open or begin a ledger, and check its last `CHECKED_AT_OPENING` rows.

        Raises:
            AlreadyServing: another process has it open.
            LedgerError: it is damaged, of a newer version, or cannot be written.
        """
        self.path = path
        self._now = now
        self._lock = LedgerLock(path)
        self._database: sqlite3.Connection | None = None
        self._attempt: tuple[int, bytes] | None = None
        """Where the ledger ends if the commit that failed is in it."""

        self._was_full = False
        """Whether that commit failed for lack of space, and nothing else."""

        try:
            self._database = self._connect()
            self._end = verify(self._database, path, last=CHECKED_AT_OPENING)
            self.epoch = self._next_epoch()
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
        """How many rows were ever written."""
        return self._end[0]

    @property
    def head(self) -> str:
        """The last row that is written, for whoever keeps a witness; see `ledger_head`."""
        return head_text(*self._end)

    def commit(self, entries: Sequence[Entry]) -> None:
        """Append all of `entries` or none; when it returns, they survive a loss of power.

        Raises:
            AlreadyServing: another process has opened the ledger since, whatever the lock says.
            LedgerError: they could not be written; `settle` says whether they are there.
        """
        if entries:
            self._transact(lambda _: entries)

    def prune(self, before_step: int, *, num_lanes: int) -> None:
        """Drop what was reported of steps before `before_step`; the chain still verifies.

        See `controller.ledger_prune`. Raises as `commit` does.
        """
        self._transact(lambda database: prune(database, before_step, num_lanes=num_lanes))

    def _transact(self, make: Callable[[sqlite3.Connection], Sequence[Entry]]) -> None:
        """Change the file as `make` does, append the rows that it returns: all or nothing."""
        database = self._open()
        self._attempt, self._was_full = None, False
        with explained(f"cannot write to the ledger {self.path}"):
            try:
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    self._check_epoch(database)
                    self._attempt = seq, head = self._append(database, make(database))
                    _IN_TRANSACTION.hit()
            except sqlite3.Error as error:
                self._was_full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
                raise
        self._end = seq, head
        self._attempt = None

    def _append(self, database: sqlite3.Connection, entries: Sequence[Entry]) -> tuple[int, bytes]:
        """Add rows to the transaction under way; return number and hash of the last one."""
        (seq, head), rows = self._end, []
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
        database.executemany(
            f"INSERT INTO ledger ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows
        )
        database.execute("UPDATE head SET seq = ?, hash = ? WHERE id = 0", (seq, head))
        return seq, head

    def settle(self) -> bool:
        """Open the file anew after a commit has failed; return whether the commit is in it.

        Raises:
            Unsettled: it cannot be read now.
            AlreadyServing: another process has opened the ledger since.
            LedgerError: rows are damaged, or missing that were acknowledged.
        """
        if self._was_full and not self._open().in_transaction:
            return False
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None
        try:
            # SQLite keeps its other files beside the one that a link leads to.
            real = self.path.resolve()
            for path in (real, real.with_name(f"{real.name}-wal")):
                forget_cached(path)
            self._database = self._connect()
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            ends = self._database.execute("SELECT seq, hash FROM head WHERE id = 0").fetchone()
        except (sqlite3.Error, LedgerError, OSError) as error:
            raise Unsettled(str(error)) from error
        verify(self._database, self.path, last=CHECKED_AT_OPENING)
        self._check_epoch(self._database)
        attempted = self._attempt
        if ends not in (self._end, attempted):
            raise LedgerError(
                f"the ledger {self.path} is damaged: it ends at row {ends[0]} after an error of "
                f"the disk, but row {self._end[0]} had been written; restore it from a copy"
            )
        self._end = ends
        self._attempt = None
        return bool(ends == attempted)

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
        with explained(f"cannot open the ledger {self.path}"):
            # Threads are the caller's affair; statements are grouped by hand.
            database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")
                self._upgrade(database)
            except BaseException:
                database.close()
                raise
            return database

    def _upgrade(self, database: sqlite3.Connection) -> None:
        """Make the tables of a new ledger, and bring those of an old one up to date."""
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (num_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        create = ""
        if num_tables == 0:
            create, version = CREATE, OLDEST_VERSION
        else:
            check_version(version, self.path)
        steps = "".join(UPGRADES[each] for each in range(version + 1, SCHEMA_VERSION + 1))
        if create or steps:
            database.executescript(
                f"BEGIN IMMEDIATE; {create} {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        # Ledgers of before it was part of the schema get it here.
        database.execute(CREATE_NEWEST)

    def _next_epoch(self) -> int:
        """Take the next fencing number: whoever opened the ledger before writes no more."""
        database = self._open()
        with explained(f"cannot write to the ledger {self.path}"), database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE head SET epoch = epoch + 1 WHERE id = 0")
        (epoch,) = database.execute("SELECT epoch FROM head WHERE id = 0").fetchone()
        return int(epoch)

    def _check_epoch(self, database: sqlite3.Connection) -> None:
        (epoch,) = database.execute("SELECT epoch FROM head WHERE id = 0").fetchone()
        if epoch != self.epoch:
            raise AlreadyServing(
                f"the ledger {self.path} was taken over by another controller (number {epoch}, "
                f"this one is {self.epoch}); this one writes no more"
            )


def read_rows(
    database: sqlite3.Connection,
    *kinds: Kind,
    min_step: int | None = None,
    max_step: int | None = None,
    seq: int | None = None,
    newest_first: bool = False,
) -> Iterator[Row]:
    """Yield rows of a ledger, or the one of a number; see `Ledger.rows`."""
    clauses: list[str] = []
    values: list[Any] = []
    if seq is not None:
        clauses.append("seq = ?")
        values.append(seq)
    by_step = min_step is not None or max_step is not None
    if kinds:
        # An index on several kinds would have all their rows sorted before the first is read.
        column = "+kind" if len(kinds) > 1 and not by_step else "kind"
        clauses.append(f"{column} IN ({', '.join('?' * len(kinds))})")
        values += [kind.value for kind in kinds]
    else:
        # They stand for rows that are no more.
        clauses.append("kind != ?")
        values.append(Kind.ANCHOR.value)
    for bound, compare in ((min_step, ">="), (max_step, "<=")):
        if bound is not None:
            clauses.append(f"step {compare} ?")
            values.append(bound)
    where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
    direction = "DESC" if newest_first else "ASC"
    order = f"step {direction}, seq {direction}" if by_step else f"seq {direction}"
    query = f"SELECT seq, kind, step, time_s, body, data FROM ledger {where} ORDER BY {order}"
    with explained("cannot read the ledger"):
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
    with explained(f"cannot read the ledger {path}"):
        database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None
        )
    with contextlib.closing(database):
        with explained(f"cannot read the ledger {path}"):
            # One transaction, so that all is read as it was at one moment.
            database.execute("BEGIN")
            (version,) = database.execute("PRAGMA user_version").fetchone()
        check_version(version, path)
        yield database
