"""One shard's entry in the index: read whole once, counted and hashed, rescued if damaged."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from loader_workers.index_partial import ScannedShard
from loader_workers.rescue import Summary, rescue, summary_of
from loader_workers.sample_map import Place, map_path, write_sample_map
from loader_workers.samples import read_samples
from loader_workers.shard_file import open_object, open_shard
from loader_workers.streams import HashedStream
from protos.dataset_index import ShardRef
from protos.errors import ShardUnreadable
from protos.spec import QUARANTINE_SHARD, SKIP_SAMPLE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardToScan:
    """One shard, and how it is read; goes to another process."""

    domain: str
    url: str
    text_field: str
    samples_folder: Path | None = None
    on_damage: str = SKIP_SAMPLE


def scan(item: ShardToScan) -> ScannedShard:
    """Read a shard whole; of one that is damaged find what is left.

    It comes back as quarantined if nothing is, if there is no folder for the map by which its
    samples are found again, or if the run wants none of a damaged shard.

    Raises:
        NotReady: it cannot be read now, which says nothing about it.
    """
    tally = _Tally()
    try:
        with open_shard(item.url) as shard:
            for sample in read_samples(shard.members, text_field=item.text_field):
                tally.add(summary_of(sample))
            sha256, num_bytes = shard.sha256(), shard.num_bytes
        if tally.num_unreadable and item.on_damage == QUARANTINE_SHARD:
            raise ShardUnreadable(f"{item.url}: {tally.first_reason}")
    except ShardUnreadable as error:
        rescued = _rescued(item) if item.on_damage == SKIP_SAMPLE else None
        if rescued is not None:
            return rescued
        logger.warning("quarantined shard of domain=%s: %s", item.domain, error)
        return ScannedShard(ref=_quarantined(item.domain, item.url, str(error)))
    return tally.scanned(item, sha256=sha256, num_bytes=num_bytes)


def _rescued(item: ShardToScan) -> ScannedShard | None:
    """Return what is left of a damaged shard; None: nothing that could be found again."""
    if item.samples_folder is None:
        return None
    try:
        with (
            open_object(item.url) as source,
            closing(HashedStream(source, chunk_bytes=1 << 20, ahead=False)) as hashed,
        ):
            sha256, num_bytes = hashed.sha256(), source.num_bytes
        found = rescue(item.url, text_field=item.text_field)
    except ShardUnreadable:
        return None
    tally = _Tally()
    tally.add(*found.samples)
    if tally.num_unreadable == len(tally.places):
        return None
    logger.warning(
        "shard of domain=%s is damaged, %d samples are left out and %d are kept: %s: %s",
        item.domain,
        tally.num_unreadable,
        len(tally.places) - tally.num_unreadable,
        item.url,
        tally.first_reason,
    )
    lost_bytes = round(found.lost_share * num_bytes)
    return tally.scanned(item, sha256=sha256, num_bytes=num_bytes, lost_bytes=lost_bytes)


@dataclass(slots=True)
class _Tally:
    """What the samples of a shard add up to."""

    places: list[Place] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    text_bytes: int = 0
    num_unreadable: int = 0
    first_reason: str = ""

    def add(self, *samples: Summary) -> None:
        for sample in samples:
            self.places.append(sample.place)
            self.text_bytes += sample.text_bytes
            if sample.kind:
                self.kinds.add(sample.kind)
            else:
                self.num_unreadable += 1
                self.first_reason = self.first_reason or sample.reason

    def scanned(
        self, item: ShardToScan, *, sha256: str, num_bytes: int, lost_bytes: int = 0
    ) -> ScannedShard:
        """Write the map of the samples; return the shard's entry."""
        if item.samples_folder is not None:
            write_sample_map(map_path(item.samples_folder, sha256), self.places)
        return ScannedShard(
            ref=ShardRef(
                domain=item.domain,
                url=item.url,
                num_bytes=num_bytes,
                num_samples=len(self.places),
                num_unreadable=self.num_unreadable,
                text_bytes=self.text_bytes,
                sha256=sha256,
                format="mixed" if len(self.kinds) == 2 else next(iter(self.kinds), "text"),
                damage=self.first_reason,
            ),
            lost_bytes=lost_bytes,
            num_unreadable=self.num_unreadable,
            first_reason=f"{item.url}: {self.first_reason}",
        )


def _quarantined(domain: str, url: str, reason: str) -> ShardRef:
    try:
        with open_object(url) as shard:
            num_bytes = shard.num_bytes
    except ShardUnreadable:
        num_bytes = 0
    return ShardRef(
        domain=domain,
        url=url,
        num_bytes=num_bytes,
        num_samples=0,
        text_bytes=0,
        sha256="",
        quarantined=reason,
    )
