"""Small files that are read again when they change: certificates, keys, tokens."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from protos.errors import ConfigError

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
"""Of such a file; more is taken for a mistake."""

_Stamp = tuple[int, int, int]


class WatchedFile(Generic[T]):
    """A file's content as of its last good state; may be asked from any thread.

    A file that is being replaced, or was damaged, leaves what was read before in force, and is
    spoken of once: a rotation that goes wrong must not stop a run.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T], *, secret: bool = False) -> None:
        """Read the file for the first time.

        Args:
            path: the file.
            parse: what its bytes mean; raises ValueError with a clause that says what is wrong.
            secret: refuse it where users outside its group may read or write it.

        Raises:
            ConfigError: it cannot be read, or says nothing usable.
        """
        self.path = path
        self._parse = parse
        self._secret = secret
        self._lock = threading.Lock()
        self._stamp, self._value = self._read()

    def get(self) -> T:
        """Return what the file says now, or what it said when it was last good."""
        with self._lock:
            if self._stamp != (stamp := self._look()):
                try:
                    self._stamp, self._value = self._read()
                except ConfigError as error:
                    logger.warning("%s; what it held before stays in force", error)
                    self._stamp = stamp
            return self._value

    def _look(self) -> _Stamp:
        try:
            return _stamp_of(self.path.stat())
        except OSError:
            return (0, 0, 0)

    def _read(self) -> tuple[_Stamp, T]:
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if self._secret and found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
                    raise ConfigError(
                        f"{self.path} is a secret that every user of this machine may read or "
                        f"write: chmod 600 {self.path}"
                    )
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from None
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{self.path} has more than {MAX_BYTES} bytes: is it the right file?")
        try:
            return _stamp_of(found), self._parse(data)
        except ValueError as error:
            raise ConfigError(f"{self.path} {error}") from None


def _stamp_of(found: os.stat_result) -> _Stamp:
    return (found.st_mtime_ns, found.st_size, found.st_ino)
