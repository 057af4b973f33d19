"""Two figures of a loader worker; `make bench-worker` runs it.

Text on the way: tokens a second from shards of text to composed batches, on one tokenizer thread,
against the tokenizer alone on the same text and thread, in turns.

A jump: the share of time that a trainer with steps of 20 ms waits for data in the 20 steps before
and after a domain's share goes from 1% to 60%, its shards not in the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

import trainer_client
from deploy.documents import Document
from deploy.tokenizer import train_tokenizer
from loader_workers.composer import Composer
from loader_workers.index import build_index
from loader_workers.tokenize import make_tokenize
from protos.apportion import apportion, no_carry
from protos.client import AdminClient
from protos.types import Lane, Mixture, Step
from tests.benchmarks import our_loader, workload
from tests.fakes_loader import make_source, make_spec, write_text_shards

_TEXT_BYTES = 24_000_000
_ROUNDS = 3
_WORK_S = 0.02
_LANES = 4


def _texts() -> list[str]:
    """Return real text: the sources of the standard library, in pieces of a few KB."""
    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        content = path.read_text(encoding="utf-8", errors="ignore")
        texts += [content[at : at + 2400] for at in range(0, len(content), 2400)]
        size += len(content)
        if size > _TEXT_BYTES:
            break
    return texts


def text_on_the_way(folder: Path) -> dict[str, float]:
    """Return tokens a second of the tokenizer alone and of the whole way, medians of rounds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shutil.rmtree(folder, ignore_errors=True)
    texts = _texts()
    documents = [Document(text=text, origin="stdlib") for text in texts]
    train_tokenizer({"code": documents[::8]}, folder / "tokenizer.json", vocab_size=16_384)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    pattern = write_text_shards(folder, "code", texts, num_shards=16)
    index = build_index({"code": (pattern,)}, text_field="text", max_bad_share=0.0)
    spec = make_spec(
        index, tokenizer, lanes=_LANES, global_sequences=64, sequence_length=1024,
        window_samples=1024, interleave=4, vocab_size=16_384, eot_id=0,
    )  # fmt: skip
    tokenize = make_tokenize(tokenizer)
    alone, on_the_way, of_cpu = [], [], []
    for _ in range(_ROUNDS):
        started, cpu_started = time.perf_counter(), time.process_time()
        num_tokens = sum(
            len(ids) for at in range(0, len(texts), 256) for ids in tokenize(texts[at : at + 256])
        )
        alone.append(num_tokens / (time.perf_counter() - started))
        alone_a_cpu_s = num_tokens / (time.process_time() - cpu_started)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        started, cpu_started = time.perf_counter(), time.process_time()
        with make_source(spec, index, folder / "cache", tokenizer=tokenizer) as source:
            zeros = np.zeros((1, 3), np.uint32)
            composer = Composer(
                source, {Lane(lane): zeros for lane in range(_LANES)}, first_slot=0, end_slot=64
            )
            mixture, carry = Mixture.uniform(1), no_carry(1)
            num_steps = num_tokens // (64 * 1024)
            composer.prepare(mixture.shares)
            for step in range(num_steps):
                counts, carry = apportion(mixture, global_sequences=64, carry=carry)
                composer.compose(Step(step), counts)
        on_the_way.append(num_steps * 64 * 1024 / (time.perf_counter() - started))
        a_cpu_s = num_steps * 64 * 1024 / (time.process_time() - cpu_started)
        of_cpu.append(a_cpu_s / alone_a_cpu_s)
    return {
        "tokenizer_alone_tokens_per_s": median(alone),
        "on_the_way_tokens_per_s": median(on_the_way),
        "ratio_by_cpu_time": median(of_cpu),
        "ratio": median(each / one for each, one in zip(on_the_way, alone, strict=True)),
    }


def jump(data: Path) -> dict[str, float]:
    """Return the share of time spent waiting for data before and after the jump."""
    cache = data / "jump-cache"
    shutil.rmtree(cache, ignore_errors=True)
    rest = 0.99 / (workload.NUM_DOMAINS - 1)
    before = [0.01, *[rest] * (workload.NUM_DOMAINS - 1)]
    with (
        our_loader.serving(
            data, cache=cache, case=our_loader.Case(global_sequences=32), shares=before
        ) as served,
        contextlib.closing(AdminClient(served.controller)) as admin,
        trainer_client.connect(served.controller, rank=0, world_size=1) as session,
    ):
        steps = _steps(session)
        for _ in range(40):
            next(steps)
        calm = _wait_share(session, steps, 20)
        admin.set_mixture(
            {
                f"domain{domain}": 0.6 if domain == 0 else 0.4 / (workload.NUM_DOMAINS - 1)
                for domain in range(workload.NUM_DOMAINS)
            }
        )
        return {
            "wait_share_before": calm,
            "wait_share_after": _wait_share(session, steps, 20),
        }


def _steps(session: trainer_client.Session) -> Iterator[None]:
    for batch in session.batches(micro_batch=32):
        # What the optimizer step of a real trainer would take.
        time.sleep(_WORK_S)
        if batch.last_of_step:
            session.end_step()
            yield


def _wait_share(session: trainer_client.Session, steps: Iterator[None], count: int) -> float:
    waited, started = session.data_wait_s, time.perf_counter()
    for _ in range(count):
        next(steps)
    return (session.data_wait_s - waited) / (time.perf_counter() - started)


def main() -> int:
    """Measure, print, and write `build/bench/worker.json`."""
    torch.set_num_threads(1)
    out = Path("build/bench").resolve()
    our_loader.prepare(out / "data" / "ours")
    report = {"text": text_on_the_way(out / "data" / "text"), "jump": jump(out / "data" / "ours")}
    (out / "worker.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
