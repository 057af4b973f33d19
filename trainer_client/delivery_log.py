"""A line for each sequence that a rank received: what the accounting of a run is made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from protos.types import Generation, Rank

if TYPE_CHECKING:
    from trainer_client.delivered import DeliveredStep


class DeliveryLog:
    """Appends to `received.rank{r}.jsonl`; a step's lines reach the file before it is trained."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: Rank,
        generation: Generation,
        slots_per_lane: int,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"received.rank{rank}.jsonl"
        self._generation = int(generation)
        self._slots_per_lane = slots_per_lane
        _cut_torn_line(self._path)
        self._file: BinaryIO | None = self._path.open("ab")

    def write(self, delivered: DeliveredStep) -> None:
        """Add the sequences of a step."""
        if self._file is None:
            raise ValueError(f"{self._path} is closed")
        self._file.writelines(
            json.dumps(self._line(delivered, row)).encode() + b"\n"
            for row in range(len(delivered.slots))
        )
        self._file.flush()

    def _line(self, delivered: DeliveredStep, row: int) -> dict[str, int | str]:
        slot = delivered.slots[row]
        epoch, window, sequence = (int(number) for number in delivered.places[row])
        return {
            "generation": self._generation,
            "step": int(delivered.step),
            "slot": slot,
            "lane": slot // self._slots_per_lane,
            "domain": int(delivered.domain_ids[row]),
            "epoch": epoch,
            "window": window,
            "sequence": sequence,
            "num_tokens": int(delivered.num_tokens[row]),
            "sha256": hashlib.sha256(delivered.tokens[row].tobytes()).hexdigest(),
        }

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut_torn_line(path: Path) -> None:
    # A rank that was killed may have left half a line; whoever reads the file expects whole ones.
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
