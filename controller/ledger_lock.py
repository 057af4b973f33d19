"""The lock of a ledger: the operating system's, so that it is free once its holder is dead."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from protos.errors import AlreadyServing, LedgerError


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
        # The lock holds all the same on a disk that is full; only its holder is not named then.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the lock back; twice does no harm."""
        # The file stays: removing it would let two processes lock two files of one name.
        if self._file is not None:
            os.close(self._file)
            self._file = None
