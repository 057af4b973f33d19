"""Builds the dataset index: every shard is read whole once, counted and hashed."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loader_workers.samples import read_samples
from loader_workers.shard_file import local_path, open_shard
from protos.dataset_index import DatasetIndex, ShardRef
from protos.errors import ConfigError, DomainEmpty, ShardUnreadable, TooMuchLost

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with how many shards are done, and of how many."""

_TOKEN_BYTES = 4
"""A stored token id counts as so many bytes of text, about what one stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedShard:
    """What a pass over a shard found."""

    ref: ShardRef
    num_unreadable: int = 0
    first_reason: str = ""


def build_index(
    domains: Mapping[str, Sequence[str]],
    *,
    text_field: str,
    max_bad_share: float,
    progress: Progress | None = None,
    threads: int = 2,
) -> DatasetIndex:
    """Index local shards; `domains` maps each domain to paths and glob patterns.

    Raises:
        DomainEmpty: a pattern matches no file, or a domain has no readable sample.
        ConfigError: a shard is in two domains, or a pattern is not one of local files.
        TooMuchLost: more than `max_bad_share` of the bytes or samples is unreadable.
    """
    urls = [(domain, url) for domain in domains for url in expand(domain, domains[domain])]
    _refuse_shared(urls)
    scanned: list[ScannedShard] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="index") as pool:
        for result in pool.map(lambda pair: scan(*pair, text_field=text_field), urls):
            scanned.append(result)
            if progress is not None:
                progress(len(scanned), len(urls))
    _refuse_loss(scanned, max_bad_share)
    index = DatasetIndex(result.ref for result in scanned)
    for domain in index.domains:
        if index.num_samples(domain) == 0:
            raise DomainEmpty(
                f"domain {domain!r} has no samples in its {len(index.shards(domain))} shards; "
                f"fill or remove it in data.domains"
            )
    return index


def expand(domain: str, patterns: Sequence[str]) -> list[str]:
    """Return the absolute paths that a domain's patterns match, sorted, each once.

    Raises:
        DomainEmpty: there are no patterns, or one matches no file.
        ConfigError: a pattern has the scheme of something other than a local file.
    """
    if not patterns:
        raise DomainEmpty(f"domain {domain!r} names no shards; set data.domains.{domain}.shards")
    found: set[str] = set()
    for pattern in patterns:
        path = local_path(pattern)
        # Path.glob takes no absolute patterns.
        found_here = glob.glob(str(path), recursive=True)  # noqa: PTH207
        matches = [match for match in found_here if Path(match).is_file()]
        if path.is_file():
            # A file whose own name has brackets matches itself.
            matches.append(str(path))
        if not matches:
            raise DomainEmpty(
                f"domain {domain!r}: no file matches {pattern!r} (looked in {Path.cwd()}); "
                f"mend data.domains.{domain}.shards"
            )
        found.update(os.path.abspath(match) for match in matches)  # noqa: PTH100 - keeps links
    return sorted(found)


def scan(domain: str, url: str, *, text_field: str) -> ScannedShard:
    """Read a shard whole; one that is damaged comes back as quarantined."""
    num_samples = num_unreadable = text_bytes = 0
    first_reason = ""
    kinds: set[str] = set()
    try:
        with open_shard(url) as shard:
            for sample in read_samples(shard.members, text_field=text_field):
                num_samples += 1
                if sample.document is None:
                    num_unreadable += 1
                    first_reason = first_reason or sample.reason
                elif isinstance(sample.document, str):
                    kinds.add("text")
                    text_bytes += len(sample.document.encode())
                else:
                    kinds.add("tokens")
                    text_bytes += _TOKEN_BYTES * len(sample.document)
            sha256, num_bytes = shard.sha256(), shard.num_bytes
    except ShardUnreadable as error:
        logger.warning("quarantined shard of domain=%s: %s", domain, error)
        return ScannedShard(ref=_quarantined(domain, url, str(error)))
    return ScannedShard(
        ref=ShardRef(
            domain=domain,
            url=url,
            num_bytes=num_bytes,
            num_samples=num_samples,
            text_bytes=text_bytes,
            sha256=sha256,
            format="mixed" if len(kinds) == 2 else next(iter(kinds), "text"),
        ),
        num_unreadable=num_unreadable,
        first_reason=f"{url}: {first_reason}",
    )


def write_index(index: DatasetIndex, path: Path) -> None:
    """Write an index under a temporary name, sync it and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".index-", delete=False) as file:
        try:
            file.write(index.to_parquet())
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _quarantined(domain: str, url: str, reason: str) -> ShardRef:
    try:
        num_bytes = Path(url).stat().st_size
    except OSError:
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


def _refuse_shared(urls: list[tuple[str, str]]) -> None:
    owner: dict[str, str] = {}
    for domain, url in urls:
        real = os.path.realpath(url)
        if real in owner:
            raise ConfigError(
                f"shard {url} is in the domains {owner[real]!r} and {domain!r}; give it to one"
            )
        owner[real] = domain


def _refuse_loss(scanned: list[ScannedShard], max_bad_share: float) -> None:
    allowed = f"data.max_bad_share allows {max_bad_share:.3g}"
    remedy = "mend or remove it, or raise data.max_bad_share"
    lost = [result.ref for result in scanned if result.ref.quarantined]
    all_bytes = sum(result.ref.num_bytes for result in scanned)
    share = sum(ref.num_bytes for ref in lost) / max(all_bytes, 1)
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
