"""Where replayed batches go: digests, arrays of a step, or webdataset shards of tokens."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset  # type: ignore[import-untyped]

from deploy.reading.replay import ReplayedStep
from protos.errors import ConfigError

DIGESTS = "digests.jsonl"
SHARD_STEPS = 100


class Sink(Protocol):
    """Takes steps in their order."""

    def write(self, step: ReplayedStep) -> None:
        """Keep a step."""


class _Digests:
    """A line for each step and slot, as `headrace run --digest` writes them."""

    def __init__(self, folder: Path, domains: Sequence[str], stack: ExitStack) -> None:
        self._file = stack.enter_context((folder / DIGESTS).open("w", encoding="utf-8"))
        self._domains = domains

    def write(self, step: ReplayedStep) -> None:
        """Keep a step's digests."""
        named = zip(step.domain_ids.tolist(), step.digests(), strict=True)
        for slot, (domain, sha256) in enumerate(named):
            row = {
                "step": step.step,
                "slot": slot,
                "domain": self._domains[domain],
                "sha256": sha256,
            }
            self._file.write(json.dumps(row) + "\n")


class _Arrays:
    """A file for each step: tokens, domain_ids, num_tokens, places."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, step: ReplayedStep) -> None:
        """Keep a step's arrays."""
        np.savez(
            self._folder / f"step-{step.step:09d}.npz",
            tokens=step.tokens,
            domain_ids=step.domain_ids,
            num_tokens=step.num_tokens,
            places=step.places,
        )


class _Shards:
    """A webdataset sample for each sequence: its tokens without padding, and whence it came."""

    def __init__(self, folder: Path, domains: Sequence[str], stack: ExitStack) -> None:
        self._folder = folder
        self._domains = domains
        self._stack = stack
        self._writer: Any = None
        self._num_steps = 0

    def write(self, step: ReplayedStep) -> None:
        """Keep a step's sequences."""
        if self._num_steps % SHARD_STEPS == 0:
            self._next_shard()
        self._num_steps += 1
        rows = zip(step.domain_ids.tolist(), step.num_tokens.tolist(), step.digests(), strict=True)
        for slot, (domain, num_tokens, sha256) in enumerate(rows):
            buffer = io.BytesIO()
            np.save(buffer, step.tokens[slot, :num_tokens])
            about = {
                "step": step.step,
                "slot": slot,
                "domain": self._domains[domain],
                "sha256": sha256,
            }
            self._writer.write(
                {
                    "__key__": f"{step.step:09d}-{slot:06d}",
                    "npy": buffer.getvalue(),
                    "json": json.dumps(about).encode(),
                }
            )

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        name = f"replay-{self._num_steps // SHARD_STEPS:06d}.tar"
        # The same steps give the same bytes, whoever replays them and whenever.
        writer = webdataset.TarWriter(
            str(self._folder / name), encoder=False, mtime=0, user="headrace", group="headrace"
        )
        self._stack.callback(writer.close)
        self._writer = writer


FORMATS: dict[str, Callable[[Path, Sequence[str], ExitStack], Sink]] = {
    "digests": _Digests,
    "npz": lambda folder, domains, stack: _Arrays(folder),
    "webdataset": _Shards,
}


@contextmanager
def writing(out: Path, form: str, domains: Sequence[str]) -> Iterator[Sink]:
    """Make a folder of one of `FORMATS`; it gets its name when all of it is there.

    Raises:
        ConfigError: there is no such format, or the folder is there already.
    """
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}: choose one of {', '.join(FORMATS)}")
    if out.exists():
        raise ConfigError(f"{out} is there already; name a folder that is not")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            yield FORMATS[form](partial, domains, stack)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)
