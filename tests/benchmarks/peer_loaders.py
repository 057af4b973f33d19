"""Other loaders on the same work, each as its own documentation sets it up: one worker process,
sequences packed beforehand wherever the loader has a form for that, shuffled, mixed by shares.

    python peer_loaders.py prepare NAME DATA
    python peer_loaders.py run NAME DATA SECONDS RESULT.json

Runs in the peers' environment (peers.txt), on its own: it is no part of the package `tests`.
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call,misc"

from __future__ import annotations

import io
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload
from workload import BATCH, NUM_DOMAINS, NUM_SHARDS, SEED, SHARES, WIDTH

Opened = Iterator[tuple[torch.Tensor, torch.Tensor]]


def _places() -> Iterator[tuple[int, int]]:
    for domain in range(NUM_DOMAINS):
        for shard in range(NUM_SHARDS):
            yield domain, shard


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# a hand-written memory map behind a DataLoader


def prepare_memmap(data: Path) -> None:
    for domain, shard in _places():
        np.save(data / f"{domain}-{shard}.npy", workload.packed(domain, shard))


class _Maps(Dataset[Any]):
    """Whole batches by number, so that the DataLoader has as little to do as it can have."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.maps: list[list[Any]] = []

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.maps:
            self.maps = [
                [np.load(self.data / f"{d}-{s}.npy", mmap_mode="r") for s in range(NUM_SHARDS)]
                for d in range(NUM_DOMAINS)
            ]
        draw = np.random.default_rng((SEED, number))
        domains = draw.choice(NUM_DOMAINS, BATCH, p=SHARES)
        rows = np.empty((BATCH, WIDTH), np.uint16)
        shards = draw.integers(0, NUM_SHARDS, BATCH)
        places = draw.random(BATCH)
        for row, (domain, shard, place) in enumerate(zip(domains, shards, places, strict=True)):
            found = self.maps[domain][shard]
            rows[row] = found[int(place * len(found))]
        return torch.from_numpy(rows), torch.from_numpy(domains)


def open_memmap(data: Path) -> Opened:
    return iter(
        DataLoader(_Maps(data), batch_size=None, num_workers=1, shuffle=False, prefetch_factor=8)
    )


# litdata: optimize with TokensLoader, CombinedStreamingDataset


def _shard_tokens(place: tuple[int, int]) -> Iterator[torch.Tensor]:
    yield torch.from_numpy(workload.joined(*place).astype(np.int32)).to(torch.uint16)


def prepare_litdata(data: Path) -> None:
    from litdata import TokensLoader, optimize

    for domain in range(NUM_DOMAINS):
        optimize(
            fn=_shard_tokens,
            inputs=[(domain, shard) for shard in range(NUM_SHARDS)],
            output_dir=str(data / str(domain)),
            chunk_size=WIDTH * 1200,
            item_loader=TokensLoader(block_size=WIDTH),
            num_workers=1,
        )


def _labelled(domain: int, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tokens, domain


def open_litdata(data: Path) -> Opened:
    from litdata import (
        CombinedStreamingDataset,
        StreamingDataLoader,
        StreamingDataset,
        TokensLoader,
    )

    parts = [
        StreamingDataset(
            str(data / str(domain)),
            item_loader=TokensLoader(block_size=WIDTH),
            shuffle=True,
            drop_last=True,
            seed=SEED,
            transform=partial(_labelled, domain),
        )
        for domain in range(NUM_DOMAINS)
    ]
    mixed = CombinedStreamingDataset(parts, seed=SEED, weights=SHARES, iterate_over_all=False)
    loader = StreamingDataLoader(
        mixed, batch_size=BATCH, num_workers=1, prefetch_factor=8, persistent_workers=True
    )
    # An epoch, which ends with the first domain that does, may end within a batch.
    return (batch for batch in _for_ever(loader) if len(batch[0]) == BATCH)


# Grain: MapDataset over memory maps, mix, batch in one worker process


class _PackedSource:
    """A grain RandomAccessDataSource over packed sequences."""

    def __init__(self, data: Path, domain: int) -> None:
        self.paths = [data / f"{domain}-{shard}.npy" for shard in range(NUM_SHARDS)]
        self.domain = np.int64(domain)
        self.maps: list[Any] = []
        sizes = [len(np.load(path, mmap_mode="r")) for path in self.paths]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not self.maps:
            self.maps = [np.load(path, mmap_mode="r") for path in self.paths]
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.maps[shard][index - self.starts[shard]], self.domain

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": []}


def open_grain(data: Path) -> Opened:
    import grain

    parts = [
        grain.MapDataset.source(_PackedSource(data, domain)).seed(SEED).shuffle().repeat()
        for domain in range(NUM_DOMAINS)
    ]
    mixed = (
        grain.MapDataset.mix(parts, weights=SHARES)
        .batch(BATCH)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=8))
    )
    return ((torch.from_numpy(tokens), torch.from_numpy(d)) for tokens, d in iter(mixed))


# webdataset: raw members, RandomMix, batched in the worker


def prepare_webdataset(data: Path) -> None:
    for domain, shard in _places():
        with tarfile.open(data / f"{domain}-{shard}.tar", "w") as tar:
            for number, row in enumerate(workload.packed(domain, shard)):
                info = tarfile.TarInfo(f"{number:06d}.bin")
                info.size = row.nbytes
                tar.addfile(info, io.BytesIO(row.tobytes()))


def _decode(domain: int, sample: dict[str, Any]) -> tuple[Any, int]:
    return np.frombuffer(sample["bin"], np.uint16), domain


def _collate(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.stack([tokens for tokens, _ in samples])
    return torch.from_numpy(rows), torch.tensor([domain for _, domain in samples])


def open_webdataset(data: Path) -> Opened:
    import webdataset as wds

    def part(domain: int) -> Any:
        urls = [str(data / f"{domain}-{shard}.tar") for shard in range(NUM_SHARDS)]
        return (
            wds.WebDataset(
                urls,
                shardshuffle=NUM_SHARDS,
                nodesplitter=None,
                workersplitter=None,
                empty_check=False,
                seed=SEED,
            )
            .shuffle(500)
            .map(partial(_decode, domain))
            .repeat()
        )

    mixed = wds.RandomMix([part(domain) for domain in range(NUM_DOMAINS)], list(SHARES))
    pipeline = wds.DataPipeline(mixed, wds.batched(BATCH, collation_fn=_collate, partial=False))
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=1, prefetch_factor=8))


# Mosaic Streaming: MDS with proportions


def _do_without_torchvision() -> None:
    """Stand in for torchvision where it cannot be loaded, as beside a torch built without CUDA.

    `streaming` imports it for its image datasets, which token ids never touch.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
        # A base class over there, so it must be a class.
        setattr(sys.modules["torchvision.datasets"], "VisionDataset", object)  # noqa: B010


def prepare_streaming(data: Path) -> None:
    _do_without_torchvision()
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{WIDTH}", "domain": "int"}
    for domain in range(NUM_DOMAINS):
        with MDSWriter(out=str(data / str(domain)), columns=columns, size_limit=2_500_000) as out:
            for shard in range(NUM_SHARDS):
                for row in workload.packed(domain, shard):
                    out.write({"tokens": row, "domain": domain})


def open_streaming(data: Path) -> Opened:
    _do_without_torchvision()
    from streaming import Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [
        Stream(local=str(data / str(domain)), proportion=share)
        for domain, share in enumerate(SHARES)
    ]
    dataset = StreamingDataset(
        streams=streams, shuffle=True, shuffle_seed=SEED, batch_size=BATCH, num_canonical_nodes=1
    )
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=8, drop_last=True)
    return ((batch["tokens"], batch["domain"]) for batch in _for_ever(loader))


PEERS: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path], Opened], str]] = {
    "memory map + DataLoader": (prepare_memmap, open_memmap, "memmap"),
    "litdata": (prepare_litdata, open_litdata, "litdata"),
    "Grain": (None, open_grain, "memmap"),
    "webdataset + DataLoader": (prepare_webdataset, open_webdataset, "webdataset"),
    "Mosaic Streaming": (prepare_streaming, open_streaming, "mds"),
}
"""How each is prepared (None: another one's files serve), opened, and where its files lie."""


def main() -> None:
    action, name, data, *rest = sys.argv[1:]
    prepare, opened, folder = PEERS[name]
    torch.set_num_threads(1)
    path = Path(data) / folder
    done = path / "done"
    if action == "prepare":
        if prepare is not None and not done.exists():
            path.mkdir(parents=True, exist_ok=True)
            prepare(path)
            done.touch()
        return
    seconds, result = rest
    opened_at = time.perf_counter()
    measured = workload.measure(opened(path), opened_at=opened_at, seconds=float(seconds))
    workload.write_result(measured, Path(result))


if __name__ == "__main__":
    main()
