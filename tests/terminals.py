"""Commands in a terminal of a given size, drawn as a terminal emulator draws them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parents[1]


class Terminal:
    """A `headrace` command in a pseudo-terminal."""

    def __init__(self, arguments: Sequence[str], *, columns: int = 80, lines: int = 24) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        self._resize(columns, lines)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def _resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Have another size, as if the window was pulled."""
        self.screen.resize(lines, columns)
        self._resize(columns, lines)

    @property
    def text(self) -> str:
        """What the screen shows now."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, timeout_s: float) -> bool:
        """Draw what comes within `timeout_s`; False: the command has closed the terminal."""
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:
            return False
        self.written += data
        self._stream.feed(data)
        return bool(data)

    def wait_for(self, condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
        """Draw until the screen meets a condition.

        Raises:
            AssertionError: it does not.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s:\n{self.text}"
            if not self.read(0.2):
                assert condition(), f"the command ended:\n{self.text}"

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._ours, keys)

    def end(self, *, timeout_s: float = 30) -> int:
        """Draw until the command ends; return its exit status."""
        deadline = time.monotonic() + timeout_s
        while self.read(0.2) or self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            if self.process.poll() is not None and not self.read(0):
                break
        return self.process.wait(10)

    def close(self) -> None:
        """Kill what is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
        os.close(self._ours)


@contextmanager
def terminal(arguments: Sequence[str], *, columns: int = 80, lines: int = 24) -> Iterator[Terminal]:
    """Start a command in a terminal; at the end nothing of it is left."""
    made = Terminal(arguments, columns=columns, lines=lines)
    try:
        yield made
    finally:
        made.close()
