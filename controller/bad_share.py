"""How much of the data is left out, and whether the run may go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from protos.dataset_index import DatasetIndex, ShardRef
from protos.errors import TooMuchLost
from protos.types import Quarantine


class BadShare:
    """Holds what is quarantined against what the index has."""

    def __init__(self, index: DatasetIndex, *, limit: float) -> None:
        """Check what was left out when the index was built.

        Raises:
            TooMuchLost: it is more than `limit` of the bytes.
        """
        self._limit = limit
        shards = [shard for domain in index.domains for shard in index.shards(domain)]
        self._num_samples = {(shard.domain, shard.url): shard.num_samples for shard in shards}
        self._total = max(1, sum(self._num_samples.values()))
        self._bad: Counter[tuple[str, str]] = Counter()
        self.at_index = tuple(
            Quarantine(domain=shard.domain, shard=shard.url, sample=-1, reason=_at_index(shard))
            for shard in shards
            if shard.quarantined or shard.num_unreadable
        )
        """What was left out when the index was built, shard by shard."""

        num_bytes = sum(shard.num_bytes for shard in shards)
        bad = [shard for shard in shards if shard.quarantined]
        bad_bytes = sum(shard.num_bytes for shard in bad)
        if bad and bad_bytes > limit * num_bytes:
            raise TooMuchLost(
                f"{len(bad)} of {len(shards)} shards are unreadable, {bad_bytes} of {num_bytes} "
                f"bytes, more than data.max_bad_share = {limit:g}; the first one: {bad[0].url}: "
                f"{bad[0].quarantined}"
            )

    def add(self, quarantines: Iterable[Quarantine]) -> TooMuchLost | None:
        """Count what is left out from now on; return an error if it is too much by now.

        Each thing is given only once.
        """
        newest = None
        for newest in quarantines:
            shard = (newest.domain, newest.shard)
            self._bad[shard] += self._num_samples.get(shard, 1) if newest.sample < 0 else 1
        num_bad = sum(
            min(count, max(1, self._num_samples.get(shard, count)))
            for shard, count in self._bad.items()
        )
        if newest is None or num_bad <= self._limit * self._total:
            return None
        return TooMuchLost(
            f"{num_bad} of {self._total} samples cannot be read, more than data.max_bad_share = "
            f"{self._limit:g}; the newest is in {newest.shard}: {newest.reason}"
        )


def _at_index(shard: ShardRef) -> str:
    if shard.quarantined:
        return f"left out whole when the index was built: {shard.quarantined}"
    return (
        f"{shard.num_unreadable} of its {shard.num_samples} samples were left out when the index "
        f"was built: {shard.damage}"
    )
