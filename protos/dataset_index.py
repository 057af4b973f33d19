"""The dataset index: which shards each domain has, and what is in them. A Parquet file.

Only controller, loader workers and tools read it; a trainer never does, so it needs no pyarrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from protos.errors import IndexMismatch, UnknownDomain

SCHEMA_VERSION = 1
_VERSION_KEY = b"headrace.index.version"
_SCHEMA = pa.schema(
    [
        ("domain", pa.string()),
        ("url", pa.string()),
        ("num_bytes", pa.int64()),
        ("num_samples", pa.int64()),
        ("text_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("format", pa.string()),
        ("quarantined", pa.string()),
        ("num_unreadable", pa.int64()),
        ("damage", pa.string()),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
_FIRST_SCHEMA = pa.schema(list(_SCHEMA)[:8])
"""Of an index of before it counted unreadable samples; it is read as if there were none."""

FORMATS = ("text", "tokens", "mixed")
"""What a shard's samples hold: text to tokenize, token ids, or some of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """One webdataset shard of one domain, as it was when the index was built."""

    domain: str
    url: str
    num_bytes: int
    num_samples: int
    """Samples that get a number, unreadable ones included; 0 if the shard is quarantined."""

    text_bytes: int
    """UTF-8 bytes of text in readable samples; a stored token id counts as 4."""

    sha256: str
    """Of the whole file, in hexadecimal."""

    format: str = "text"
    """One of `FORMATS`."""

    quarantined: str = ""
    """Why the whole shard is left out; empty: it is not."""

    num_unreadable: int = 0
    """Of `num_samples`, those that are left out."""

    damage: str = ""
    """Why the first of those is."""

    def __post_init__(self) -> None:
        if not self.domain or not self.url:
            raise ValueError(
                f"a shard must have a domain and a URL, got {self.domain!r}, {self.url!r}"
            )
        for name in ("num_bytes", "num_samples", "text_bytes", "num_unreadable"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.quarantined and self.num_samples:
            raise ValueError(
                f"a quarantined shard counts no samples, got {self.num_samples} for {self.url}"
            )
        if not self.quarantined and len(self.sha256) != 64:
            raise ValueError(f"sha256 must have 64 hexadecimal digits, got {self.sha256!r}")


class DatasetIndex:
    """The shards of every domain, in the run's order of domains. Never changes."""

    def __init__(self, shards: Iterable[ShardRef]) -> None:
        by_domain: dict[str, list[ShardRef]] = {}
        for shard in shards:
            by_domain.setdefault(shard.domain, []).append(shard)
        self._by_domain = {name: tuple(rows) for name, rows in by_domain.items()}
        self._parquet: bytes | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, in the order in which they first appear."""
        return tuple(self._by_domain)

    def shards(self, domain: str) -> tuple[ShardRef, ...]:
        """Return all shards of a domain, quarantined ones included.

        Raises:
            UnknownDomain: the index has no such domain.
        """
        if domain not in self._by_domain:
            raise UnknownDomain(
                f"the dataset index has no domain {domain!r}; it has {', '.join(self.domains)}"
            )
        return self._by_domain[domain]

    def num_samples(self, domain: str) -> int:
        """Return how many samples of a domain have a number."""
        return sum(shard.num_samples for shard in self.shards(domain))

    def text_bytes(self, domain: str) -> int:
        """Return the size of a domain, in bytes of text."""
        return sum(shard.text_bytes for shard in self.shards(domain))

    def to_parquet(self) -> bytes:
        """Return the index as a Parquet file; the same shards give the same bytes."""
        if self._parquet is None:
            rows = [
                {name: getattr(shard, name) for name in _SCHEMA.names}
                for shards in self._by_domain.values()
                for shard in shards
            ]
            sink = pa.BufferOutputStream()
            table = pa.Table.from_pylist(rows, schema=_SCHEMA)
            pq.write_table(table, sink, compression="zstd")
            self._parquet = sink.getvalue().to_pybytes()
        return self._parquet

    @classmethod
    def from_parquet(cls, data: bytes, *, source: str = "the dataset index") -> DatasetIndex:
        """Read an index; `source` names it in errors.

        Raises:
            IndexMismatch: the bytes are not an index of this version.
        """
        remedy = "build it again with `headrace index`"
        try:
            table = pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise IndexMismatch(f"{source} is not a Parquet file; {remedy}") from error
        version = (
            (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode("utf-8", "replace")
        )
        if version != str(SCHEMA_VERSION):
            raise IndexMismatch(
                f"{source} has index version {version}, this program reads version "
                f"{SCHEMA_VERSION}; {remedy}"
            )
        if not table.schema.equals(_SCHEMA) and not table.schema.equals(_FIRST_SCHEMA):
            raise IndexMismatch(f"{source} has other columns than an index; {remedy}")
        try:
            index = cls(ShardRef(**row) for row in table.to_pylist())
        except (ValueError, TypeError) as error:
            raise IndexMismatch(f"{source} has a row that cannot be: {error}; {remedy}") from error
        # Another version of the Parquet writer may give other bytes: what was read is what counts.
        index._parquet = data
        return index

    @property
    def data_sha256(self) -> str:
        """SHA-256 of what the shards hold, in the order in which they stand, wherever they lie."""
        held = [
            [name, [[shard.sha256, shard.num_samples] for shard in shards]]
            for name, shards in self._by_domain.items()
        ]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    @property
    def sha256(self) -> str:
        """SHA-256 of the Parquet file, in hexadecimal."""
        return hashlib.sha256(self.to_parquet()).hexdigest()
