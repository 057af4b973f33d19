"""Shards and token shards that change, or whose store fails, while a worker reads them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loader_workers.tokenize import Tokenize
from tests.fakes_consumer import (
    ConsumedRun,
    WorkerProcess,
    consumed_run,
    global_batches,
    write_corpus,
    write_run,
)
from tests.fakes_damage import make_sound
from tests.fakes_loader import tokenize_words
from tests.fakes_store import FaultyStore, serving_store

pytestmark = pytest.mark.slow

NUM_STEPS = 40


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))


def _remove(path: Path) -> None:
    path.unlink()


@contextmanager
def _run_without_windows_in_memory(out: Path, patterns: dict[str, str]) -> Iterator[ConsumedRun]:
    """Serve a run by a worker that gathers every sequence from its token shards."""
    with consumed_run(write_run(out, patterns, steps=NUM_STEPS), num_workers=0) as run:
        run.workers["w0"] = WorkerProcess(
            run.address,
            "w0",
            cache=out / "cache",
            log=out / "w0.log",
            options=["--window-bytes", "0"],
        )
        yield run


@pytest.mark.fault_row(26, "token shards cut off, emptied, overwritten, removed under a worker")
@pytest.mark.timeout(120)
def test_token_shards_that_change_under_a_worker_cost_it_neither_its_life_nor_a_token(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    patterns = write_corpus(tmp_path / "data")
    with _run_without_windows_in_memory(tmp_path / "calm", patterns) as run:
        run.consume(2, until=NUM_STEPS)
        expected = global_batches(run.deliveries())
    harm = {5: _cut, 12: _empty, 19: _overwrite, 26: _remove}
    hit = dict.fromkeys(harm, 0)
    with _run_without_windows_in_memory(tmp_path / "harmed", patterns) as run:

        def after_step(step: int) -> None:
            if step in harm:
                for path in sorted((tmp_path / "harmed" / "cache").glob("*.tokens")):
                    # One that was harmed before may not have been built again yet.
                    with contextlib.suppress(OSError):
                        harm[step](path)
                        hit[step] += 1

        run.consume(2, until=NUM_STEPS, after_step=after_step)
        assert run.workers["w0"].process.poll() is None
        assert global_batches(run.deliveries()) == expected
    assert all(hit.values()), hit
    record_injections(sum(hit.values()), "the same batches, by the same process")


class _HarmsAtFirst:
    """A tokenizer that does something to the shard once, between two reads of it."""

    def __init__(self, harm: Callable[[], None]) -> None:
        self._tokenize: Tokenize = tokenize_words()
        self._harm = harm
        self.num_harmed = 0

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        if not self.num_harmed:
            self._harm()
            self.num_harmed = 1
        return self._tokenize(texts)


@pytest.mark.fault_row(26, "a shard cut off or replaced in its place while it is tokenized")
@pytest.mark.parametrize("how", ["cut", "other bytes", "removed and made anew"])
def test_a_shard_that_changes_while_it_is_tokenized_costs_what_is_gone_of_it(
    how: str, tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    # Several times as large as what is read and tokenized at once.
    sound = make_sound(tmp_path, count=4000)
    path, kept = Path(sound.ref.url), len(sound.data) * 3 // 4
    assert kept > 3 << 20

    def harm() -> None:
        if how == "cut":
            os.truncate(path, kept)
        elif how == "other bytes":
            with path.open("r+b") as file:
                file.seek(kept)
                file.write(b"x" * (len(sound.data) - kept))
        else:
            path.unlink()
            path.write_bytes(sound.data[:kept])

    tokenize = _HarmsAtFirst(harm)
    found = replace(sound.converter(), tokenize=tokenize).convert(sound.ref)
    num_left_out = sound.check(found)
    if how == "removed and made anew":
        # What was opened is read to its end, whatever has its name meanwhile.
        assert not num_left_out
    else:
        assert found.damaged
        assert 0 < num_left_out < len(sound.documents) // 3
    record_injections(tokenize.num_harmed, f"{num_left_out} of 4000 samples left out")


@pytest.mark.fault_row(27, "the store of a worker's shards fails in all ways by turns")
@pytest.mark.timeout(120)
def test_a_worker_whose_store_fails_delivers_the_same_batches_later(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    patterns = write_corpus(tmp_path / "data")
    local = write_run(tmp_path / "local", patterns, steps=NUM_STEPS)
    with consumed_run(local) as run:
        run.consume(2, until=NUM_STEPS)
        expected = global_batches(run.deliveries())
    store = FaultyStore()
    for path in sorted((tmp_path / "data").rglob("*.tar")):
        store.objects[path.relative_to(tmp_path / "data").as_posix()] = path.read_bytes()
    faults = ("503", "short", "expired", "range", "500", "reset", "429")
    with serving_store(store) as base:
        remote = {name: f"{base}/{name}/{{0000..0002}}.tar" for name in patterns}
        run_file = write_run(tmp_path / "remote", remote, steps=NUM_STEPS)
        # Every other answer is wrong; several in a row are waited out for longer and longer.
        store.plan(*(each for fault in faults for each in (fault, "")))
        with consumed_run(run_file) as run:
            run.consume(2, until=NUM_STEPS)
            assert global_batches(run.deliveries()) == expected
            assert run.status().quarantines == ()
    assert store.all_happened()
    assert all(store.happened[fault] == 1 for fault in faults)
    record_injections(len(faults), ", ".join(faults))
