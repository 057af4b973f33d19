"""A worker's memory and open files stay bounded, however many domains and shards there are."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest

from loader_workers.composer import Composer
from protos.apportion import apportion, no_carry
from protos.dataset_index import DatasetIndex, ShardRef
from protos.types import Lane, Mixture, Step
from tests.fakes_loader import make_source, make_spec

_DOCUMENTS = 16
_TOKENS = 120
_LANES = 8


def _write_shard(path: Path, number: int) -> ShardRef:
    tokens = np.random.default_rng(number).integers(1, 200, _DOCUMENTS * _TOKENS, dtype=np.uint16)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for position, document in enumerate(np.split(tokens, _DOCUMENTS)):
            info = tarfile.TarInfo(f"{position:06d}.u16")
            info.size = document.nbytes
            tar.addfile(info, io.BytesIO(document.tobytes()))
    path.write_bytes(sink.getvalue())
    return ShardRef(
        domain=path.parent.name,
        url=str(path),
        num_bytes=len(sink.getvalue()),
        num_samples=_DOCUMENTS,
        text_bytes=4 * len(tokens),
        sha256=hashlib.sha256(sink.getvalue()).hexdigest(),
        format="tokens",
    )


def _write_corpus(folder: Path, *, num_domains: int, num_shards: int) -> DatasetIndex:
    shards = []
    for domain in range(num_domains):
        home = folder / f"domain{domain:03d}"
        home.mkdir(parents=True)
        for shard in range(num_shards):
            path = home / f"{shard:04d}.tar"
            shards.append(_write_shard(path, domain * num_shards + shard))
    return DatasetIndex(shards)


def _stream(folder: str, index: bytes, num_steps: int, figures: multiprocessing.Queue[int]) -> None:
    """Compose steps in a process of its own; say how much it holds after each tenth of them."""
    found = DatasetIndex.from_parquet(index, source="the test")
    spec = make_spec(
        found, lanes=_LANES, global_sequences=512, sequence_length=64, window_samples=64,
        interleave=4,
    )  # fmt: skip
    mixture, carry = Mixture.uniform(len(found.domains)), no_carry(len(found.domains))
    zeros = np.zeros((len(found.domains), 3), np.uint32)
    process = psutil.Process()
    with make_source(spec, found, Path(folder), window_bytes=64_000_000) as source:
        composer = Composer(
            source, {Lane(lane): zeros for lane in range(_LANES)}, first_slot=0, end_slot=512
        )
        for step in range(num_steps):
            counts, carry = apportion(mixture, global_sequences=512, carry=carry)
            if step == 0:
                composer.prepare(mixture.shares)
            composer.compose(Step(step), counts)
            if (step + 1) % (num_steps // 10) == 0:
                figures.put(process.memory_info().rss)
                figures.put(process.num_fds())
        composer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_domains", "num_shards", "num_steps"),
    [
        pytest.param(10, 20, 200, id="200 shards"),
        pytest.param(
            200, 100, 2000, id="20,000 shards",
            marks=[pytest.mark.long, pytest.mark.timeout(1200)],
        ),
    ],
)  # fmt: skip
def test_memory_is_flat_and_open_files_are_bounded(
    tmp_path: Path, num_domains: int, num_shards: int, num_steps: int
) -> None:
    index = _write_corpus(tmp_path, num_domains=num_domains, num_shards=num_shards)
    context = multiprocessing.get_context("spawn")
    figures = context.Queue()
    worker = context.Process(
        target=_stream, args=(str(tmp_path / "cache"), index.to_parquet(), num_steps, figures)
    )
    worker.start()
    try:
        read = [figures.get(timeout=600) for _ in range(20)]
    finally:
        worker.join(60)
        worker.kill()
    resident, files = read[::2], read[1::2]
    print(f"resident MB {[each // 10**6 for each in resident]}, files {files}")
    assert worker.exitcode == 0
    assert max(resident) < 1.5e9
    # The second half of the run takes no more than the first did, but for the allocator's slack.
    assert max(resident[5:]) < max(resident[:5]) * 1.05 + 20e6
    assert max(files) < 2_000
