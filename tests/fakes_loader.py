"""Small corpora, tokenizers and a scripted controller for the tests of the loader workers."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import random
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import webdataset  # type: ignore[import-untyped]
from numpy.typing import NDArray

from loader_workers.cache import ShardCache
from loader_workers.convert import Converter
from loader_workers.source import WINDOW_BYTES, WindowSource
from loader_workers.tokenize import Tokenize, make_tokenize
from protos.apportion import apportion, no_carry
from protos.dataset_index import DatasetIndex
from protos.errors import NotReady
from protos.server import serving_controller
from protos.spec import RunSpec
from protos.status import RunStatus
from protos.types import (
    Beat,
    BlobChunk,
    Credit,
    Generation,
    JoinAnswer,
    JoinRequest,
    LaneTable,
    Mixture,
    Plan,
    PlanEvent,
    ReportAnswer,
    Step,
    StepReport,
    WorkerBeat,
)

EOT = "<|endoftext|>"
WORDS = tuple(f"w{number}" for number in range(200))


def tokenizer_json() -> bytes:
    """Return a tokenizer of whole words, as a `tokenizer.json`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([EOT])
    return tokenizer.to_str().encode()


def shard_bytes(samples: Sequence[Mapping[str, bytes | str]], *, tar_format: str = "") -> bytes:
    """Write samples with webdataset's own writer."""
    sink = io.BytesIO()
    with webdataset.TarWriter(sink, encoder=False, format=tar_format or None, mtime=0.0) as writer:
        for sample in samples:
            members = {
                name: value.encode() if isinstance(value, str) and name != "__key__" else value
                for name, value in sample.items()
            }
            writer.write(members)
    return sink.getvalue()


def npy_bytes(array: NDArray[np.generic]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def write_text_shards(
    folder: Path, domain: str, documents: Sequence[str], *, num_shards: int
) -> str:
    """Spread documents over shards; return the pattern that matches them."""
    (folder / domain).mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        mine = [
            {"__key__": f"{number:06d}", "txt": document}
            for number, document in enumerate(documents)
            if number % num_shards == shard
        ]
        (folder / domain / f"{shard:04d}.tar").write_bytes(shard_bytes(mine))
    return str(folder / domain / "*.tar")


def write_token_shards(
    folder: Path, domain: str, lengths: Sequence[Sequence[int]], *, first_token: int = 1
) -> str:
    """Write one shard of token arrays for each list of lengths; every token is another number."""
    (folder / domain).mkdir(parents=True, exist_ok=True)
    token = first_token
    for shard, sizes in enumerate(lengths):
        samples: list[dict[str, bytes | str]] = []
        for number, size in enumerate(sizes):
            tokens = np.arange(token, token + size, dtype="<u4")
            token += size
            samples.append({"__key__": f"{number:06d}", "u32": tokens.tobytes()})
        (folder / domain / f"{shard:04d}.tar").write_bytes(shard_bytes(samples))
    return str(folder / domain / "*.tar")


def random_documents(seed: int, count: int, *, longest: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(longest))) for _ in range(count)]


def make_spec(index: DatasetIndex, tokenizer: bytes = b"", /, **changes: Any) -> RunSpec:
    """Return settings for an index; `changes` replace the defaults."""
    from hashlib import sha256

    values: dict[str, Any] = {
        "run_id": "test",
        "seed": 7,
        "domains": index.domains,
        "lanes": 4,
        "global_sequences": 16,
        "sequence_length": 16,
        "window_samples": 8,
        "interleave": 2,
        "num_steps": 1000,
        "lag": 2,
        "vocab_size": 300,
        "eot_id": 201,
        "text_field": "text",
        "index_sha256": index.sha256,
        "tokenizer_sha256": sha256(tokenizer).hexdigest() if tokenizer else "",
        "degraded_after_s": 60.0,
        "data_timeout_s": 60.0,
    }
    return RunSpec(**{**values, **changes})


@contextmanager
def make_source(
    spec: RunSpec,
    index: DatasetIndex,
    cache_dir: Path,
    *,
    tokenizer: bytes = b"",
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[WindowSource]:
    """Open an index through a cache, as a worker does."""
    converter = Converter.of_run(spec, make_tokenize(tokenizer) if tokenizer else None)
    with (
        ShardCache(
            cache_dir,
            budget_bytes=1 << 30,
            converter=converter,
            tokenizer_sha256=spec.tokenizer_sha256,
        ) as cache,
        WindowSource(spec, index, cache, threads=2, window_bytes=window_bytes) as source,
    ):
        yield source


def tokenize_words() -> Tokenize:
    return make_tokenize(tokenizer_json())


def scripted_plans(
    spec: RunSpec, mixtures: Mapping[int, Sequence[float]], *, first_step: int = 0
) -> tuple[Plan, ...]:
    """Return the plans of mixtures by their first step, with the carries between."""
    plans: list[Plan] = []
    carry = no_carry(spec.num_domains)
    mixture = Mixture.from_shares(mixtures[min(mixtures)])
    for step in range(first_step, max(mixtures) + 1):
        if step in mixtures:
            mixture = Mixture.from_shares(mixtures[step])
            plans.append(
                Plan(
                    version=len(plans) + 1,
                    first_step=Step(step),
                    mixture=mixture,
                    carry_q32=tuple(carry.tolist()),
                )
            )
        _, carry = apportion(mixture, global_sequences=spec.global_sequences, carry=carry)
    return tuple(plans)


class BlockingCredits(Iterator[Credit]):
    """Credits as a server gives them to a service: they block until `end`."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Credit | None] = SimpleQueue()

    def put(self, credit: Credit) -> None:
        self._queue.put(credit)

    def end(self) -> None:
        self._queue.put(None)

    def __next__(self) -> Credit:
        credit = self._queue.get()
        if credit is None:
            raise StopIteration
        return credit


class ScriptedController:
    """A controller that hands out one run and the plan events it is told; no decisions."""

    def __init__(self, spec: RunSpec, *, index: bytes, tokenizer: bytes) -> None:
        self.spec = spec
        self._blobs = {"index": index, "tokenizer": tokenizer}
        self._events: list[PlanEvent] = []
        self._changed = asyncio.Condition()
        self.beats: list[WorkerBeat] = []
        self.num_enlisted = 0

    async def say(self, event: PlanEvent) -> None:
        async with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    async def watch_plans(
        self, worker_id: str, *, answers: bool = False
    ) -> AsyncIterator[PlanEvent]:
        sent = 0
        while True:
            async with self._changed:
                while len(self._events) == sent:
                    await self._changed.wait()
                new, sent = self._events[sent:], len(self._events)
            for event in new:
                yield event

    async def enlist(
        self, beats: AsyncIterator[WorkerBeat]
    ) -> AsyncIterator[RunSpec | BlobChunk | Beat]:
        self.num_enlisted += 1
        yield self.spec
        for name, data in self._blobs.items():
            half = len(data) // 2
            for part in (slice(0, half), slice(half, len(data))):
                if data[part]:
                    yield BlobChunk(
                        name=name, offset=part.start, total_bytes=len(data), data=data[part]
                    )
        async for beat in beats:
            self.beats.append(beat)
            yield Beat()

    async def join(self, request: JoinRequest) -> JoinAnswer:
        raise NotReady("this controller takes no ranks")

    async def locate(self, generation: Generation, *, unreachable: str) -> LaneTable:
        return LaneTable(version=1, endpoints=())

    async def report(self, report: StepReport) -> ReportAnswer:
        raise NotReady("this controller takes no reports")


class _NoAdmin:
    """An admin service that only exists."""

    async def status(self) -> RunStatus:
        raise NotReady("this controller has no status")

    async def set_mixture(self, shares: Mapping[str, float]) -> int:
        raise NotReady("this controller decides nothing")

    async def freeze(self) -> None:
        raise NotReady("this controller decides nothing")

    async def resume(self) -> None:
        raise NotReady("this controller decides nothing")

    async def snapshot_policy(self) -> str:
        raise NotReady("this controller decides nothing")

    async def drain(self) -> None:
        raise NotReady("this controller decides nothing")

    async def scale(self, workers: int) -> None:
        raise NotReady("this controller decides nothing")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the one loop that serves all controllers: gRPC's poller outlives a closed loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="scripted-controllers", daemon=True).start()
    return loop


class ServedController:
    """A scripted controller served on an event loop of another thread."""

    def __init__(self, controller: ScriptedController, *, address: str = "127.0.0.1:0") -> None:
        self.controller = controller
        self.address = address
        self._up = threading.Event()
        self._down = asyncio.Event()

    def say(self, event: PlanEvent) -> None:
        asyncio.run_coroutine_threadsafe(self.controller.say(event), _loop()).result(10)

    def __enter__(self) -> ServedController:
        self._served = asyncio.run_coroutine_threadsafe(self._serve(), _loop())
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        _loop().call_soon_threadsafe(self._down.set)
        self._served.result(20)

    async def _serve(self) -> None:
        async with serving_controller(
            self.controller, _NoAdmin(), address=self.address, drain_s=0.1
        ) as bound:
            self.address = bound
            self._up.set()
            await self._down.wait()


def json_sample(key: str, fields: Mapping[str, object]) -> dict[str, str]:
    return {"__key__": key, "json": json.dumps(fields)}
