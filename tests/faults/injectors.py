"""What makes disks and system calls fail for real: a tiny file system, and strace's injections."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tiny_disk(folder: Path, *, num_bytes: int) -> Iterator[Path]:
    """Have a file system of so many bytes at `folder`; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "headrace-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: a process that was killed may be on its way out.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all space that is left; return the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for num_bytes in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(num_bytes))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return ballast


class SystemCalls:
    """strace, told to have the nth call of a kind fail; proves from its log that it did."""

    def __init__(self, log: Path, *, call: str, error: str, when: str) -> None:
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed: apt-get install strace")
        self._log = log
        # `-I 2`: it hands SIGTERM on, which it would block otherwise.
        self.prefix = ["strace", "-I", "2", "-f", "-qq", "-o", str(log), "-e", f"trace={call}"]
        self.prefix += ["-e", f"inject={call}:error={error}:when={when}"]

    def num_injected(self) -> int:
        """Return how many calls have failed because of it."""
        with contextlib.suppress(FileNotFoundError):
            return len(re.findall(r"\(INJECTED\)", self._log.read_text(errors="replace")))
        return 0


def have_root() -> bool:
    """Say whether this process may mount and trace."""
    return os.geteuid() == 0
