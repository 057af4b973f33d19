"""Builds the dataset index: every shard is read whole once, counted and hashed."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from loader_workers.index_partial import PartialIndex, ScannedShard, stamp_of_file
from loader_workers.location import expand_numbers, has_glob, local_path, parse_location
from loader_workers.remote import REMOTE, Remote
from loader_workers.scan import ShardToScan, scan
from protos.dataset_index import DatasetIndex
from protos.errors import ConfigError, DomainEmpty, ShardUnreadable, TooMuchLost
from protos.failpoints import DurableWrite
from protos.spec import SKIP_SAMPLE, STOP

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with how many shards are done, and of how many."""

_RENAME = DurableWrite("index.rename", "a synced index gets its name")

_STAMPS_AT_ONCE = 16
"""Shards looked up at once: a remote one takes a round trip."""

FORMAT_VERSION = 1
"""Raise it when the same shard must be indexed otherwise: work half done does not count then."""


Mapper = Callable[
    [Callable[["ShardToScan"], ScannedShard], Sequence["ShardToScan"]], Iterable[ScannedShard]
]
"""Applies a function to all items, in parallel; yields the results in the items' order."""


def in_threads(num_threads: int) -> Mapper:
    """Return a mapper for small datasets and tests."""

    def mapper(
        function: Callable[[ShardToScan], ScannedShard], items: Sequence[ShardToScan]
    ) -> Iterable[ScannedShard]:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="index") as pool:
            yield from pool.map(function, items)

    return mapper


def build_index(
    domains: Mapping[str, Sequence[str]],
    *,
    text_field: str,
    max_bad_share: float,
    on_damage: str = SKIP_SAMPLE,
    samples_folder: Path | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
    mapper: Mapper | None = None,
) -> DatasetIndex:
    """Index shards; `domains` maps each domain to paths, URLs and patterns of them.

    Args:
        domains: in the run's order.
        text_field: of `.json` and `.jsonl` members.
        max_bad_share: how much may be unreadable.
        on_damage: one of `protos.spec.ON_DAMAGE`.
        samples_folder: where the map of each shard's samples is written; None: there are none.
        partial: where work that is done is written down, so that an interrupted indexing goes on.
        progress: told shard by shard.
        mapper: scans shards in parallel.

    Raises:
        DomainEmpty: a pattern matches no file, or a domain has no readable sample.
        ConfigError: a shard is in two domains, or a pattern cannot be looked up.
        TooMuchLost: more than `max_bad_share` of the bytes or samples is unreadable.
        NotReady: a store cannot be reached now; what is done already is kept.
    """
    urls = [(domain, url) for domain in domains for url in expand(domain, domains[domain])]
    _refuse_shared(urls)
    items = [
        ShardToScan(
            domain=domain,
            url=url,
            text_field=text_field,
            samples_folder=samples_folder,
            on_damage=on_damage,
        )
        for domain, url in urls
    ]
    settings = f"{FORMAT_VERSION} {on_damage} {text_field}"
    with PartialIndex(partial, settings=settings, samples_folder=samples_folder) as done:
        scanned = _scan_all(items, done, mapper or in_threads(2), progress)
        _refuse_loss(scanned, 0.0 if on_damage == STOP else max_bad_share, on_damage)
        index = DatasetIndex(result.ref for result in scanned)
        for domain in index.domains:
            if index.num_samples(domain) == 0:
                raise DomainEmpty(
                    f"domain {domain!r} has no samples in its {len(index.shards(domain))} shards; "
                    f"fill or remove it in data.domains"
                )
    return index


def _scan_all(
    items: Sequence[ShardToScan],
    done: PartialIndex,
    mapper: Mapper,
    progress: Progress | None,
) -> list[ScannedShard]:
    with ThreadPoolExecutor(_STAMPS_AT_ONCE, thread_name_prefix="stamp") as pool:
        found = pool.map(_stamp, (item.url for item in items))
        stamps = {(item.domain, item.url): stamp for item, stamp in zip(items, found, strict=True)}
    known = {key: done.find(*key, stamp) for key, stamp in stamps.items()}
    missing = [item for item in items if known[item.domain, item.url] is None]
    num_done = len(items) - len(missing)
    if num_done:
        logger.info("indexing goes on: %d of %d shards are done", num_done, len(items))
    for item, scanned in zip(missing, mapper(scan, missing), strict=True):
        key = (item.domain, item.url)
        result = replace(scanned, stamp=stamps[key])
        known[key] = result
        done.add(result)
        num_done += 1
        if progress is not None:
            progress(num_done, len(items))
    return [result for result in known.values() if result is not None]


def _stamp(url: str) -> str:
    """Return which bytes a URL has now; empty: nobody can say."""
    location = parse_location(url)
    if location.is_local:
        return stamp_of_file(url)
    try:
        return REMOTE.open(location).stamp
    except ShardUnreadable:
        return ""


def expand(domain: str, patterns: Sequence[str], *, remote: Remote = REMOTE) -> list[str]:
    """Return the URLs that a domain's patterns match, sorted, each once; local ones are paths.

    Raises:
        DomainEmpty: there are no patterns, or one matches nothing.
        ConfigError: a pattern has a scheme that is not read, or needs a list that there is not.
        NotReady: a store cannot be listed now.
    """
    if not patterns:
        raise DomainEmpty(f"domain {domain!r} names no shards; set data.domains.{domain}.shards")
    found: set[str] = set()
    for pattern in patterns:
        for each in expand_numbers(pattern):
            location = parse_location(each)
            if location.is_local:
                matches = _local_matches(each)
            elif has_glob(location.path):
                matches = [match.url for match in remote.list(location)]
            else:
                matches = [location.url]
            if not matches:
                where = f" (looked in {Path.cwd()})" if location.is_local else ""
                raise DomainEmpty(
                    f"domain {domain!r}: no file matches {each!r}{where}; "
                    f"mend data.domains.{domain}.shards"
                )
            found.update(matches)
    return sorted(found)


def _local_matches(pattern: str) -> list[str]:
    path = local_path(pattern)
    # Path.glob takes no absolute patterns.
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207
    matches = [match for match in found if Path(match).is_file()]
    if path.is_file():
        # A file whose own name has brackets matches itself.
        matches.append(str(path))
    return [os.path.abspath(match) for match in matches]  # noqa: PTH100 - keeps links


def write_index(index: DatasetIndex, path: Path) -> None:
    """Write an index under a temporary name, sync it and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".index-", delete=False) as file:
        try:
            file.write(index.to_parquet())
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            with _RENAME.around():
                Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _refuse_shared(urls: list[tuple[str, str]]) -> None:
    owner: dict[str, str] = {}
    for domain, url in urls:
        real = os.path.realpath(url) if parse_location(url).is_local else url
        if real in owner:
            raise ConfigError(
                f"shard {url} is in the domains {owner[real]!r} and {domain!r}; give it to one"
            )
        owner[real] = domain


def _refuse_loss(scanned: list[ScannedShard], max_bad_share: float, on_damage: str) -> None:
    allowed = f"data.max_bad_share allows {max_bad_share:.3g}"
    remedy = "mend or remove it, or raise data.max_bad_share"
    if on_damage == STOP:
        allowed = "data.on_damage is stop"
        remedy = "mend or remove it, or choose another data.on_damage"
    lost = [result.ref for result in scanned if result.ref.quarantined]
    all_bytes = sum(result.ref.num_bytes for result in scanned)
    share = sum(ref.num_bytes for ref in lost) / max(all_bytes, 1)
    torn = [result for result in scanned if result.lost_bytes]
    torn_share = sum(result.lost_bytes for result in torn) / max(all_bytes, 1)
    if torn and share + torn_share > max_bad_share:
        raise TooMuchLost(
            f"{len(torn)} shards are damaged and {torn_share:.3g} of all bytes are lost with that; "
            f"{allowed}; the first, {torn[0].first_reason}: {remedy}"
        )
    if lost and (share > max_bad_share or not all_bytes):
        raise TooMuchLost(
            f"domain {lost[0].domain!r} has an unreadable shard: {lost[0].quarantined}; with "
            f"{len(lost) - 1} others that is {share:.3g} of all bytes and {allowed}: {remedy}"
        )
    bad = [result for result in scanned if result.num_unreadable]
    num_samples = sum(result.ref.num_samples for result in scanned)
    share = sum(result.num_unreadable for result in bad) / max(num_samples, 1)
    if share > max_bad_share:
        raise TooMuchLost(
            f"{sum(result.num_unreadable for result in bad)} of {num_samples} samples are "
            f"unreadable ({share:.3g}) and {allowed}; the first, {bad[0].first_reason}: {remedy}"
        )
