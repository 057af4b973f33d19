"""Drops what ranks reported of steps long past, so that a ledger does not grow for ever.

Plans, generations, quarantines and all else that the order of the data depends on are kept, so that
every batch can still be made again. In place of consecutive rows that were dropped stands an
anchor: it says from which row on, and has the hash before the first and that of the last of them,
so that the rows on both sides are still chained. A PRUNE row holds a hash over all anchors, so that
an anchor that nobody recorded, put where a row was taken out, is found.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

from controller.ledger_file import COLUMNS
from controller.ledger_schema import Entry, Kind, encode_body

_DROPPED = (Kind.STEP, Kind.SHADOW, Kind.CURSORS, Kind.SEAL)
"""Of these, rows of old steps are dropped, but for the last places of each lane and the carries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """Stands for dropped rows."""

    first_seq: int
    last_seq: int
    prev_hash: bytes
    """Of the row before them."""

    last_hash: bytes
    """Of the last of them."""

    def digest(self) -> bytes:
        """Return what the hash over all anchors is made of."""
        return f"{self.first_seq}|{self.last_seq}|".encode() + self.prev_hash + self.last_hash


def prune(database: sqlite3.Connection, before_step: int, *, num_lanes: int) -> Sequence[Entry]:
    """Drop what can be dropped of steps before `before_step`; return the record of it.

    Within a transaction that the caller has begun. Empty: there was nothing to drop.
    """
    dropped = _dropped_rows(database, before_step, num_lanes=num_lanes)
    if not dropped:
        return ()
    anchors = _joined([*read_anchors(database), *dropped])
    numbers = [(anchor.last_seq,) for anchor in dropped]
    database.executemany("DELETE FROM ledger WHERE seq = ?", numbers)
    database.execute("DELETE FROM ledger WHERE kind = ?", (Kind.ANCHOR.value,))
    database.executemany(
        f"INSERT INTO ledger ({COLUMNS}) VALUES (?, ?, -1, 0.0, ?, NULL, ?, ?)",
        [
            (
                anchor.last_seq,
                Kind.ANCHOR.value,
                encode_body({"first_seq": anchor.first_seq}),
                anchor.prev_hash,
                anchor.last_hash,
            )
            for anchor in anchors
        ],
    )
    body = {
        "before_step": before_step,
        "rows": len(dropped),
        "anchors": len(anchors),
        "anchors_sha256": anchors_digest(anchors),
    }
    return (Entry(kind=Kind.PRUNE, step=-1, body=body),)


def read_anchors(database: sqlite3.Connection) -> list[Anchor]:
    """Return all anchors of a ledger, in their order."""
    rows = database.execute(
        "SELECT seq, body, prev_hash, hash FROM ledger WHERE kind = ? ORDER BY seq",
        (Kind.ANCHOR.value,),
    )
    return [
        Anchor(
            first_seq=json.loads(body)["first_seq"],
            last_seq=seq,
            prev_hash=prev_hash,
            last_hash=last_hash,
        )
        for seq, body, prev_hash, last_hash in rows
    ]


def anchors_digest(anchors: Sequence[Anchor]) -> str:
    """Return the hash over all anchors, as a PRUNE row holds it."""
    digest = hashlib.sha256()
    for anchor in anchors:
        digest.update(anchor.digest())
    return digest.hexdigest()


def _dropped_rows(
    database: sqlite3.Connection, before_step: int, *, num_lanes: int
) -> list[Anchor]:
    """Return the rows to be dropped, each as an anchor of its own."""
    kept = _places_kept(database, before_step, num_lanes=num_lanes)
    kinds = [kind.value for kind in _DROPPED]
    rows = database.execute(
        f"SELECT seq, kind, body, prev_hash, hash FROM ledger WHERE step >= 0 AND step < ? "
        f"AND kind IN ({', '.join('?' * len(kinds))}) ORDER BY seq",
        (before_step, *kinds),
    )
    return [
        Anchor(first_seq=seq, last_seq=seq, prev_hash=prev_hash, last_hash=last_hash)
        for seq, kind, body, prev_hash, last_hash in rows
        if seq not in kept and not (kind == Kind.SEAL.value and "carry_q32" in body)
    ]


def _places_kept(database: sqlite3.Connection, before_step: int, *, num_lanes: int) -> set[int]:
    """Return the newest rows before the step that hold each lane's place."""
    kept: set[int] = set()
    lanes: set[int] = set()
    rows = database.execute(
        "SELECT seq, body FROM ledger WHERE kind = ? AND step < ? ORDER BY step DESC, seq DESC",
        (Kind.CURSORS.value, before_step),
    )
    for seq, body in rows:
        found = set(json.loads(body)["lanes"]) - lanes
        if found:
            kept.add(seq)
            lanes |= found
        if len(lanes) >= num_lanes:
            break
    return kept


def _joined(anchors: list[Anchor]) -> list[Anchor]:
    """Return them in their order, those of consecutive rows as one."""
    joined: list[Anchor] = []
    for anchor in sorted(anchors, key=lambda each: each.last_seq):
        if joined and joined[-1].last_seq + 1 == anchor.first_seq:
            joined[-1] = replace(joined[-1], last_seq=anchor.last_seq, last_hash=anchor.last_hash)
        else:
            joined.append(anchor)
    return joined
