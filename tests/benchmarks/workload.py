"""What all loaders are measured on: the corpus, the shares, and how a consumer measures.

Imported in the peers' environment as well: nothing but numpy, psutil and torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

NUM_DOMAINS = 8
NUM_SHARDS = 8
DOCUMENTS_A_SHARD = 2000
MEAN_TOKENS = 600
SIGMA = 1.0
VOCAB_SIZE = 50_000
EOT_ID = 0
SHARES = (0.30, 0.20, 0.15, 0.12, 0.09, 0.07, 0.05, 0.02)
BATCH = 16
SEQUENCE_LENGTH = 1024
WIDTH = SEQUENCE_LENGTH + 1
WARM_UP_S = 2.0
SEED = 7

Sequences = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Batches: [16, 1025] or its two halves' tokens, and the domains of their sequences."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a consumer saw."""

    tokens_per_s: float
    cpu_s_per_mtok: float
    """Over all processes that take part."""

    first_batch_s: float
    """From the call that opens the loader, its imports done."""

    peak_rss_mb: float
    """Added up over all processes; what they share counts in each of them."""

    shares: list[float]
    """Of the domains, as they came."""

    batches: int
    cpu_s_per_mtok_by_process: dict[str, float]


def documents(domain: int, shard: int) -> list[NDArray[np.uint16]]:
    """Return the documents of a shard; the same in every form of the corpus."""
    draw = np.random.default_rng((SEED, domain, shard))
    mu = np.log(MEAN_TOKENS) - SIGMA**2 / 2
    lengths = np.maximum(draw.lognormal(mu, SIGMA, DOCUMENTS_A_SHARD).astype(int), 1)
    tokens = draw.integers(1, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def joined(domain: int, shard: int) -> NDArray[np.uint16]:
    """Return a shard's documents joined, with the end-of-text token after each."""
    eot = np.full(1, EOT_ID, np.uint16)
    return np.concatenate([part for each in documents(domain, shard) for part in (each, eot)])


def packed(domain: int, shard: int) -> NDArray[np.uint16]:
    """Return a shard cut into [sequences, 1025] beforehand; what is left over is dropped."""
    tokens = joined(domain, shard)
    return tokens[: len(tokens) // WIDTH * WIDTH].reshape(-1, WIDTH)


def measure(
    batches: Sequences,
    *,
    opened_at: float,
    seconds: float,
    names: Mapping[int, str] = MappingProxyType({}),
) -> Measured:
    """Consume for a while and say what it cost.

    Args:
        batches: what is consumed; the trainer does nothing else.
        opened_at: when the loader was asked for, by `time.perf_counter`.
        seconds: how long to measure, after a warm-up.
        names: what the children are, by process id.
    """
    tokens, _ = next(batches)
    first_batch_s = time.perf_counter() - opened_at
    _consume(batches, WARM_UP_S)
    cpu_before = _cpu(names)
    started = time.perf_counter()
    num_batches, counts = _consume(batches, seconds)
    elapsed = time.perf_counter() - started
    cpu_after = _cpu(names)
    num_mtok = num_batches * BATCH * WIDTH / 1e6
    by_process = {
        name: (used - cpu_before.get((name, pid), 0.0)) / num_mtok
        for (name, pid), used in cpu_after.items()
    }
    return Measured(
        tokens_per_s=num_mtok * 1e6 / elapsed,
        cpu_s_per_mtok=sum(by_process.values()),
        first_batch_s=first_batch_s,
        peak_rss_mb=sum(_peak_bytes(process) for process in _processes()) / 1e6,
        shares=(counts / max(counts.sum(), 1)).tolist(),
        batches=num_batches,
        cpu_s_per_mtok_by_process=by_process,
    )


def write_result(measured: Measured, path: Path) -> None:
    """Hand the result to whoever started this process."""
    path.write_text(json.dumps(asdict(measured)))


def _consume(batches: Sequences, seconds: float) -> tuple[int, NDArray[np.int64]]:
    num_batches, counts = 0, torch.zeros(NUM_DOMAINS, dtype=torch.int64)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        tokens, domains = next(batches)
        # A token is looked at, so that nothing can be handed over unread.
        assert int(tokens[-1, -1]) < VOCAB_SIZE
        assert tokens.shape[0] == BATCH
        assert tokens.shape[1] >= SEQUENCE_LENGTH
        counts += torch.bincount(domains, minlength=NUM_DOMAINS)
        num_batches += 1
    return num_batches, counts.numpy()


def _processes() -> list[psutil.Process]:
    mine = psutil.Process()
    return [mine, *mine.children(recursive=True)]


def _cpu(names: Mapping[int, str]) -> dict[tuple[str, int], float]:
    """Return CPU seconds so far by process, named by its part."""
    used = {}
    for place, process in enumerate(_processes()):
        times = process.cpu_times()
        name = names.get(process.pid, f"child {place}" if place else "consumer")
        used[name, process.pid] = times.user + times.system
    return used


def _peak_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
