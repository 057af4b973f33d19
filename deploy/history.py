"""What the trainers received, read from the delivery logs that the harness's trainer writes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.errors import DataError

LOG_PATTERN = "received.rank*.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One sequence as a rank received it."""

    generation: int
    step: int
    slot: int
    lane: int
    domain: str
    epoch: int
    window: int
    sequence: int
    num_tokens: int
    """Not padding."""

    sha256: str
    """Of the sequence's tokens, as raw bytes in the wire's dtype."""

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the lane found it in its domain."""
        return (self.epoch, self.window, self.sequence)


def read_deliveries(folder: Path, domains: Sequence[str]) -> list[Delivery]:
    """Return every line of every rank's log in `folder`; `domains` are the run's, in order.

    Raises:
        DataError: there is no log, or a line is damaged.
    """
    paths = sorted(folder.glob(LOG_PATTERN))
    if not paths:
        raise DataError(
            f"{folder} holds no {LOG_PATTERN}: no trainer received anything yet, or none kept its "
            "log there (connect(delivery_log=...))"
        )
    return [delivery for path in paths for delivery in _read_log(path, domains)]


def _read_log(path: Path, domains: Sequence[str]) -> Iterator[Delivery]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # the rank was killed in mid-line: it never trained on this one
            yield _parse(line, path, number, domains)


def _parse(line: bytes, path: Path, number: int, domains: Sequence[str]) -> Delivery:
    try:
        row: dict[str, Any] = json.loads(line)
        return Delivery(
            domain=domains[int(row["domain"])],
            sha256=str(row["sha256"]),
            **{name: int(row[name]) for name in _INTEGERS},
        )
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}, line {number}: not a line of a delivery log: {error!r}"
        ) from error


_INTEGERS = ("generation", "step", "slot", "lane", "epoch", "window", "sequence", "num_tokens")


@dataclass(frozen=True, slots=True)
class History:
    """The steps that count: what a resume trained again replaces what it had trained before."""

    steps: Mapping[int, tuple[Delivery, ...]]
    """In slot order. A slot that came twice stands twice."""

    num_superseded: int
    """Sequences of steps that a later generation trained again."""

    unfinished_steps: tuple[int, ...]
    """The last steps, where a run that was stopped had reached only some ranks."""

    @property
    def deliveries(self) -> Iterator[Delivery]:
        """Everything in the order of steps and slots."""
        for step in sorted(self.steps):
            yield from self.steps[step]


def trained_history(deliveries: Iterable[Delivery], *, global_sequences: int) -> History:
    """Return the history that the newest checkpointed line of training has.

    A generation that begins at step s replaces every step from s on, also those that it did not
    reach: the model that goes on has never seen them.
    """
    by_generation: dict[int, dict[int, list[Delivery]]] = defaultdict(lambda: defaultdict(list))
    for delivery in deliveries:
        by_generation[delivery.generation][delivery.step].append(delivery)
    kept: dict[int, list[Delivery]] = {}
    num_superseded = 0
    for _, steps in sorted(by_generation.items()):
        for step in [step for step in kept if step >= min(steps)]:
            num_superseded += len(kept.pop(step))
        kept.update(steps)
    unfinished = []
    for step in sorted(kept, reverse=True):
        if len({delivery.slot for delivery in kept[step]}) >= global_sequences:
            break
        unfinished.append(step)
        del kept[step]
    in_order = {step: tuple(sorted(rows, key=lambda row: row.slot)) for step, rows in kept.items()}
    return History(in_order, num_superseded, tuple(reversed(unfinished)))


def write_digests(history: History, out: Path) -> int:
    """Write one line for each step and slot; return how many.

    Two runs that were given the same plans write the same file, however many ranks and workers
    they had.
    """
    partial = out.with_name(out.name + ".partial")
    num_lines = 0
    with partial.open("w", encoding="utf-8") as file:
        for delivery in history.deliveries:
            names = ("step", "slot", "domain", "sha256")
            row = {name: getattr(delivery, name) for name in names}
            file.write(json.dumps(row) + "\n")
            num_lines += 1
    partial.replace(out)
    return num_lines
