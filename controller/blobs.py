"""The files that loader workers get from the controller."""

from __future__ import annotations

from dataclasses import dataclass

from protos.types import BlobChunk

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Blobs:
    """The files that workers get from the controller."""

    index: bytes
    tokenizer: bytes
    """Empty: the run needs none."""

    def chunks(self) -> list[BlobChunk]:
        """Cut both into pieces that fit a message."""
        return [
            BlobChunk(
                name=name,
                offset=offset,
                total_bytes=len(data),
                data=data[offset : offset + CHUNK_BYTES],
            )
            for name, data in (("index", self.index), ("tokenizer", self.tokenizer))
            for offset in range(0, len(data), CHUNK_BYTES)
        ]
