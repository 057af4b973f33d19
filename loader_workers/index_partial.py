"""What an interrupted indexing had done: a line of JSON for each shard, beside the index to be.

A line counts only for the same bytes: URL, size and time of change (or ETag) stand in its key.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from loader_workers.location import parse_location
from loader_workers.sample_map import map_path
from protos.dataset_index import ShardRef


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedShard:
    """What a pass over a shard found."""

    ref: ShardRef
    stamp: str = ""
    """Which bytes were read; empty: nobody can say, so that it is read again."""

    num_unreadable: int = 0
    first_reason: str = ""
    lost_bytes: int = 0
    """Of the shard, in stretches of damage."""


def stamp_of_file(url: str) -> str:
    """Return what changes when a local file does; empty for a remote shard, or if it is gone."""
    location = parse_location(url)
    if not location.is_local:
        return ""
    try:
        status = Path(location.path).stat()
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


class PartialIndex:
    """The lines of an indexing that is under way; `close(done=True)` removes them."""

    def __init__(
        self, path: Path | None, *, settings: str, samples_folder: Path | None = None
    ) -> None:
        self._path = path
        self._settings = settings
        self._samples_folder = samples_folder
        self._done: dict[tuple[str, str], ScannedShard] = {}
        self._file: IO[str] | None = None
        if path is not None:
            self._read(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def find(self, domain: str, url: str, stamp: str) -> ScannedShard | None:
        """Return what was found in these very bytes before."""
        found = self._done.get((domain, url))
        if found is None or not stamp or found.stamp != stamp or found.ref.quarantined:
            return None
        folder = self._samples_folder
        if folder is not None and not map_path(folder, found.ref.sha256).exists():
            return None
        return found

    def add(self, scanned: ScannedShard) -> None:
        """Write down what was found."""
        if self._file is None or not scanned.stamp:
            return
        self._file.write(json.dumps({"settings": self._settings, **asdict(scanned)}) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                fields = json.loads(line)
                if fields.pop("settings") != self._settings:
                    continue
                scanned = ScannedShard(**{**fields, "ref": ShardRef(**fields["ref"])})
            except (ValueError, TypeError, KeyError, AttributeError):
                # A line that was torn when the indexing was interrupted.
                continue
            self._done[scanned.ref.domain, scanned.ref.url] = scanned
        if text and not text.endswith("\n"):
            os.truncate(path, len(text[: text.rfind("\n") + 1].encode()))

    def close(self, *, done: bool) -> None:
        """End writing; `done`: the index is complete, and this is no longer needed."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if done and self._path is not None:
                self._path.unlink(missing_ok=True)

    def __enter__(self) -> PartialIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(done=kind is None)
