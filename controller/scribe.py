"""What the decision loop writes to the ledger, and what it does while the ledger takes nothing."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence

from controller.ledger import Ledger, Unsettled
from controller.ledger_schema import Entry, Kind, event_entry
from controller.snapshots import NUM_KEPT
from controller.threads import SingleThread
from protos.errors import LedgerError
from protos.failpoints import DurableWrite

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""How often a ledger that cannot be written is tried again."""

MOST_NOTED = 10_000
"""Records that may wait for a commit; beyond that they are counted and dropped."""

_PRUNE = DurableWrite("ledger.prune", "reports of steps long past are dropped")
RECOVERY = DurableWrite("ledger.recovery", "it is recorded that the ledger can be written again")


class Scribe:
    """Writes records in the order in which they come. Lives on the event loop.

    caller   call     waits for
    anybody  note     never
    loop     commit   the ledger's thread; after an error, the word of the disk
    loop     mend     the ledger's thread

    FINE <-> AT FAULT (`fault` says why). After an error nothing is written until `mend` has opened
    the file anew, read it from the disk, and written a record of what has happened.
    """

    def __init__(
        self, ledger: Ledger, ledger_thread: SingleThread, *, now: Callable[[], float]
    ) -> None:
        self.fault = ""
        """Why the ledger cannot be written; empty: it can."""

        self.num_faults = 0
        """How often it could not be written any more."""

        self.noted: list[Entry] = []
        """To be written with the next commit."""

        self._ledger = ledger
        self._thread = ledger_thread
        self._now = now
        self._failed_at_s = 0.0
        self._num_dropped = 0
        self._num_failures = 0
        self._given_up = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def on_written(self, call: Callable[[], None]) -> None:
        """Have `call` run whenever something was written, or could not be."""
        self._listeners.append(call)

    def note(self, *entries: Entry) -> None:
        """Have `entries` written with the next commit, within a second or so."""
        room = max(MOST_NOTED - len(self.noted), 0)
        self.noted.extend(entries[:room])
        self._num_dropped += len(entries[room:])

    async def commit(self, entries: Sequence[Entry], write: DurableWrite) -> None:
        """Write what was noted and `entries`: all or nothing.

        Raises:
            LedgerError: nothing was written; `fault` says why, if the run can go on without.
        """
        noted, self.noted = self.noted, []
        try:
            await self._do(lambda: self._ledger.commit([*noted, *entries]), write)
        except LedgerError:
            self.noted = [*noted, *self.noted]
            raise

    async def prune(self, before_step: int, *, num_lanes: int) -> None:
        """Drop reports of steps before `before_step`, unless a saved policy state needs them.

        Raises:
            LedgerError: nothing was dropped; `fault` says why, if the run can go on without.
        """

        def work() -> None:
            newest = self._ledger.rows(Kind.SNAPSHOT, newest_first=True)
            saved = [row.step for row in itertools.islice(newest, NUM_KEPT)]
            if len(saved) == NUM_KEPT:
                self._ledger.prune(min(before_step, saved[-1] + 1), num_lanes=num_lanes)

        await self._do(work, _PRUNE)

    async def mend(self) -> bool:
        """Try whether the ledger can be written again, and say so in it; return whether it can.

        Raises:
            LedgerError: it is damaged: what was acknowledged is not there any more.
        """
        seconds, failures = round(self._now() - self._failed_at_s, 1), self._num_failures
        entry = event_entry(
            "ledger written again", reason=self.fault, seconds=seconds, dropped=self._num_dropped
        )
        try:
            await self.commit([entry], RECOVERY)
        except LedgerError:
            if self._num_failures == failures:
                raise
        if self._num_failures > failures:
            return False
        logger.warning("the ledger can be written again after %g s; decisions go on", seconds)
        self.fault, self._num_dropped = "", 0
        return True

    def give_up(self) -> None:
        """Wait for the disk no longer: the controller stops."""
        self._given_up.set()

    async def wait_to_retry(self) -> None:
        """Wait until the ledger may be tried again."""
        try:
            async with asyncio.timeout(RETRY_S):
                await self._given_up.wait()
        except TimeoutError:
            return

    async def _do(self, work: Callable[[], None], write: DurableWrite) -> None:
        try:
            await self._thread.call(self._write, work, write)
        except LedgerError as error:
            self._begin_fault(error)
            if not await self._is_written():
                raise
        finally:
            self._tell()

    def _tell(self) -> None:
        for call in self._listeners:
            call()

    def _write(self, work: Callable[[], None], write: DurableWrite) -> None:
        try:
            with write.around():
                work()
        except OSError as error:
            raise LedgerError(f"cannot write to the ledger {self._ledger.path}: {error}") from error

    def _begin_fault(self, error: LedgerError) -> None:
        self._num_failures += 1
        if self.fault:
            return
        self.fault, self._failed_at_s = str(error), self._now()
        self.num_faults += 1
        self._tell()
        logger.error("no decisions while the ledger cannot be written: %s", error)

    async def _is_written(self) -> bool:
        """Learn from the disk whether the commit that failed is there, however long that takes.

        Raises:
            LedgerError: what was acknowledged is gone, or the controller stops before it is known.
        """
        while True:
            try:
                return await self._thread.call(self._ledger.settle)
            except LedgerError:
                self.fault = ""  # nothing can mend that
                raise
            except Unsettled as error:
                if self._given_up.is_set():
                    raise LedgerError(f"{self.fault}; it cannot be read either: {error}") from error
                await self.wait_to_retry()
