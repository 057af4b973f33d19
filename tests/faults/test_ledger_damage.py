"""A ledger that was cut or changed, at every byte of its end: whole commits, or a refusal."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from controller.ledger import Ledger, read_rows, reading_ledger, verify
from controller.ledger_schema import Kind, Row, event_entry, plan_entry, seal_entry
from protos.errors import LedgerError
from protos.types import Mixture, Plan, Step

LAST = 4096
"""Bytes at the end of each file that are tried one by one."""

Content = list[tuple[int, Kind, int, str]]


def _content(rows: Iterator[Row]) -> Content:
    return [(row.seq, row.kind, row.step, json.dumps(row.body, sort_keys=True)) for row in rows]


def _write(path: Path, commits: range) -> list[int]:
    """Write commits of three rows each; return how many rows each of them ends with."""
    ends = []
    with Ledger(path, now=lambda: 7.5) as ledger:
        for step in commits:
            plan = Plan(
                version=step + 1,
                first_step=Step(step),
                mixture=Mixture.from_shares((1 + step, 2, 3)),
                carry_q32=(step, -step, 0),
            )
            ledger.commit(
                [
                    event_entry("something happened", step=step, detail="x" * (step % 7)),
                    plan_entry(plan, reason="why"),
                    seal_entry(step, observed_through=step, carry_after=None),
                ]
            )
            ends.append(ledger.num_rows)
        # As the disk holds them now, with the newest commits in the log alone.
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            shutil.copy(source, path.with_name(f"image{suffix}"))
    return ends


class Image:
    """The files of a ledger as a crash left them, to be damaged again and again."""

    def __init__(self, folder: Path, ends: list[int]) -> None:
        self.folder = folder
        self.database = (folder / "image").read_bytes()
        self.log = (folder / "image-wal").read_bytes()
        self.ends = {0, *ends}
        self.whole = self.read(self.database, self.log)

    def read(self, database: bytes, log: bytes) -> Content:
        """Return the rows of damaged files.

        Raises:
            LedgerError: they are refused.
        """
        path = self.folder / "damaged.sqlite"
        for suffix, content in (("", database), ("-wal", log)):
            path.with_name(path.name + suffix).write_bytes(content)
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        with reading_ledger(path) as opened:
            verify(opened, path)
            return _content(read_rows(opened))

    def outcome(self, database: bytes, log: bytes) -> str:
        """Return what came of it: `refused`, `whole`, or `cut` to fewer commits, all of them whole.

        Raises:
            AssertionError: rows were changed, or a commit is there in part.
        """
        try:
            found = self.read(database, log)
        except LedgerError:
            return "refused"
        if found == self.whole:
            return "whole"
        assert found == self.whole[: len(found)]
        assert len(found) in self.ends
        return "cut"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    # Where nothing is synced: what is tried is the content alone.
    shared = Path("/dev/shm")
    folder = tmp_path_factory.mktemp("image")
    work = shared / f"headrace-{folder.name}" if shared.is_dir() else folder
    work.mkdir(exist_ok=True)
    ends = _write(work / "ledger.sqlite", range(24))
    yield Image(work, ends)
    shutil.rmtree(work)


def _count(outcomes: list[str]) -> str:
    kinds = ("whole", "cut", "refused")
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds)


@pytest.mark.fault_row(22, "the ledger's log cut at every byte of its last 4 KiB")
def test_a_log_cut_anywhere_leaves_whole_commits(
    image: Image, record_injections: Callable[..., None]
) -> None:
    ends = range(len(image.log) - LAST, len(image.log))
    outcomes = [image.outcome(image.database, image.log[:end]) for end in ends]
    # What had not reached the disk when power was lost was never acknowledged.
    assert set(outcomes) == {"cut"}
    record_injections(len(outcomes), _count(outcomes))


@pytest.mark.fault_row(22, "a bit flipped at each of many places of the ledger's log")
def test_a_flipped_bit_in_the_log_is_never_read_as_something_else(
    image: Image, record_injections: Callable[..., None]
) -> None:
    draw = random.Random(3)
    outcomes = []
    for at in range(len(image.log) - LAST, len(image.log)):
        changed = bytearray(image.log)
        changed[at] ^= 1 << draw.randrange(8)
        outcomes.append(image.outcome(image.database, bytes(changed)))
    assert "cut" in outcomes
    record_injections(len(outcomes), _count(outcomes))


@pytest.mark.fault_row(22, "the ledger's file cut or changed, bit by bit")
def test_a_file_that_was_cut_or_changed_is_refused_or_read_as_it_was(
    image: Image, record_injections: Callable[..., None]
) -> None:
    path = image.folder / "settled.sqlite"
    path.write_bytes(image.database)
    path.with_name(f"{path.name}-wal").write_bytes(image.log)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    settled = path.read_bytes()
    assert image.outcome(settled, b"") == "whole"
    draw = random.Random(4)
    outcomes = [image.outcome(settled[:end], b"") for end in range(0, len(settled), 61)]
    for at in (*range(len(settled) - LAST, len(settled)), *range(0, len(settled), 53)):
        changed = bytearray(settled)
        changed[at] ^= 1 << draw.randrange(8)
        outcomes.append(image.outcome(bytes(changed), b""))
    # A commit that is on the disk for good is never cut off without a word.
    assert "cut" not in outcomes
    assert outcomes.count("refused") > 200
    record_injections(len(outcomes), _count(outcomes))
