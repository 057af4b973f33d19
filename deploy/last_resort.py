"""The end of a process that was told to stop, where stopping takes too long."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.exit_codes import STOPPED
from deploy.processes import Family, StopSignals

WITHIN_S = 3.5
"""After the signal: with the time that killing takes, all is over within 5 s."""

_OVER = 0
"""The byte that ends the watch; no signal has this number."""


@contextmanager
def last_resort(
    family: Family, folder: Path | None = None, *, within_s: float = WITHIN_S
) -> Iterator[None]:
    """End this process by force where SIGINT or SIGTERM have not ended the block in time.

    Python runs a signal's handler between two of its own instructions; a library may be deaf for
    long, as Ray is while it starts. The number of the signal, however, is written to a pipe at
    once, and a thread that reads it counts the seconds. Then all of `family` is killed, `folder`
    removed, and the process ends with the exit code of a stopped run. Where an exception ends the
    block, nothing of `family` outlives it either.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while (told := os.read(reader, 1)[0]) not in (_OVER, signal.SIGINT, signal.SIGTERM):
            pass
        if told != _OVER and not over.wait(within_s):
            _end(family, folder, within_s)

    thread = threading.Thread(target=watch, name="headrace-last-resort", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        family.end()
        raise
    finally:
        signal.set_wakeup_fd(former)
        over.set()
        os.write(writer, bytes([_OVER]))
        thread.join()
        os.close(reader)
        os.close(writer)


@contextmanager
def stoppable(folder: Path | None = None) -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does, once, and both within seconds."""
    with StopSignals() as stop, last_resort(Family(), folder), stop.raising():
        yield


def _end(family: Family, folder: Path | None, within_s: float) -> None:
    family.end()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    shown = (
        "\x1b[?25h" if sys.stderr.isatty() else ""
    )  # the cursor, which a display may have hidden
    said = (
        f"{shown}\nheadrace: ended {within_s:g} s after it was told to stop, with what it was at "
    )
    said += "left undone\n"
    # Not through `sys.stderr`, whose lock may be held for ever.
    os.write(2, said.encode())
    os._exit(STOPPED)
