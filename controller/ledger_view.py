"""A ledger as it was at one moment, to be read while a controller writes it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from controller.ledger import read_rows
from controller.ledger_schema import Kind, Row


class LedgerView:
    """The rows behind a connection that `reading_ledger` has opened."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def rows(
        self,
        *kinds: Kind,
        min_step: int | None = None,
        max_step: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Row]:
        """Yield rows; see `Ledger.rows`."""
        return read_rows(
            self._database,
            *kinds,
            min_step=min_step,
            max_step=max_step,
            newest_first=newest_first,
        )

    def newest(self, kind: Kind) -> Row | None:
        """Return the row of a kind that was written last; None: there is none."""
        return next(self.rows(kind, newest_first=True), None)
