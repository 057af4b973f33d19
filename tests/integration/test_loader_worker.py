"""A loader worker over real gRPC, against a scripted controller and a direct composition."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from loader_workers.composer import Composer
from loader_workers.index import build_index
from loader_workers.worker import Worker, WorkerSettings
from protos.dataset_index import DatasetIndex
from protos.errors import (
    HeadraceError,
    IndexMismatch,
    InvalidMessage,
    NotReady,
    StaleGeneration,
    WorkerUnreachable,
    WrongRun,
)
from protos.planbook import PlanBook
from protos.slots import lanes_of, rank_slots
from protos.spec import RunSpec
from protos.types import Credit, Generation, Lane, LaneBatch, Plan, PlanEvent, Step
from tests.fakes_loader import (
    ScriptedController,
    ServedController,
    make_source,
    make_spec,
    random_documents,
    scripted_plans,
    tokenizer_json,
    write_text_shards,
)
from tests.fakes_stream import GENERATION, RankStream, whole_stream


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    spec: RunSpec
    index: DatasetIndex
    tokenizer: bytes
    plans: tuple[Plan, ...]


def _corpus(folder: Path, **changes: float) -> _Corpus:
    patterns = {
        name: [write_text_shards(folder, name, random_documents(seed, 60), num_shards=3)]
        for seed, name in enumerate(("web", "code", "books"))
    }
    index = build_index(patterns, text_field="text", max_bad_share=0.0)
    tokenizer = tokenizer_json()
    spec = make_spec(index, tokenizer, **changes)
    plans = scripted_plans(spec, {0: [0.5, 0.5, 0], 4: [0.1, 0.2, 0.7], 7: [0, 0.9, 0.1]})
    return _Corpus(spec=spec, index=index, tokenizer=tokenizer, plans=plans)


def _begin(corpus: _Corpus, *, sealed_through: int, generation: int = GENERATION) -> PlanEvent:
    return PlanEvent(
        generation=Generation(generation),
        plans=corpus.plans,
        sealed_through=sealed_through,
        reset=True,
    )


@contextmanager
def _served(
    corpus: _Corpus, folder: Path, *, sealed_through: int = 9, num_workers: int = 1
) -> Iterator[tuple[ServedController, list[Worker]]]:
    """Start a controller and workers that share a cache."""
    controller = _controller(corpus)
    with ExitStack() as stack:
        served = stack.enter_context(ServedController(controller))
        workers = []
        for number in range(num_workers):
            settings = WorkerSettings(
                controller=served.address, cache_dir=folder / "cache", worker_id=f"w{number}"
            )
            workers.append(stack.enter_context(Worker(settings, stop=threading.Event())))
        if sealed_through >= 0:
            served.say(_begin(corpus, sealed_through=sealed_through))
        for worker in workers:
            worker.wait_ready(timeout_s=20)
        yield served, workers


def _direct(corpus: _Corpus, folder: Path, *, steps: int) -> list[tuple[LaneBatch, ...]]:
    """Compose the whole batches without service, wire or worker."""
    spec = corpus.spec
    book = PlanBook(global_sequences=spec.global_sequences)
    for plan in corpus.plans:
        book.add(plan)
    zeros = np.zeros((spec.num_domains, 3), np.uint32)
    cursors = {Lane(lane): zeros for lane in range(spec.lanes)}
    with make_source(spec, corpus.index, folder / "direct", tokenizer=corpus.tokenizer) as source:
        composer = Composer(source, cursors, first_slot=0, end_slot=spec.global_sequences)
        return [composer.compose(Step(step), book.counts(Step(step))) for step in range(steps)]


def _same(got: LaneBatch, expected: LaneBatch) -> None:
    skipped = got.first_slot - expected.first_slot
    rows = slice(skipped, skipped + len(got.domain_ids))
    for name in ("tokens", "domain_ids", "num_tokens", "places"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name)[rows])
    np.testing.assert_array_equal(got.cursor_after, expected.cursor_after)


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 1), (3, 2)])
def test_ranks_get_their_slots_of_what_a_direct_composition_gives(
    tmp_path: Path, world_size: int, num_workers: int
) -> None:
    corpus = _corpus(tmp_path)
    spec = corpus.spec
    expected = _direct(corpus, tmp_path, steps=10)
    delivered = [0] * 10
    with _served(corpus, tmp_path, num_workers=num_workers) as (_, workers):
        for rank in range(world_size):
            slots = rank_slots(rank, world_size=world_size, global_sequences=16)
            for lane in lanes_of(slots, slots_per_lane=spec.slots_per_lane):
                worker = workers[lane % num_workers]
                with RankStream(spec, worker.endpoint, slots=slots, lanes=[lane]) as one:
                    for batch in one.take(10):
                        (got,) = batch.lanes
                        _same(got, expected[batch.step][lane])
                        delivered[batch.step] += len(got.domain_ids)
                        assert not batch.degraded
                        assert batch.plan_version == 1 + (batch.step >= 4) + (batch.step >= 7)
    assert delivered == [16] * 10


def test_short_steps_come_together_up_to_the_next_plan(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    expected = _direct(corpus, tmp_path, steps=10)
    with (
        _served(corpus, tmp_path) as (_, (worker,)),
        whole_stream(corpus.spec, worker.endpoint, most_steps=3, credits=10) as rank,
    ):
        batches = rank.take(4)
        # Plans begin with steps 0, 4 and 7.
        assert [(batch.step, batch.num_steps) for batch in batches] == [
            (0, 3),
            (3, 1),
            (4, 3),
            (7, 3),
        ]
        for batch in batches:
            for lane in batch.lanes:
                for index in range(batch.num_steps):
                    _same(lane.at(index), expected[batch.step + index][lane.lane])


@pytest.mark.parametrize("behind", [0, 2, 5])
def test_a_stream_opens_at_any_step_with_cursors_of_it_or_of_an_earlier_one(
    tmp_path: Path, behind: int
) -> None:
    corpus = _corpus(tmp_path)
    expected = _direct(corpus, tmp_path, steps=10)
    cursor_step = 6 - behind
    cursors = {batch.lane: batch.cursor_after for batch in expected[cursor_step - 1]}
    with (
        _served(corpus, tmp_path) as (_, (worker,)),
        whole_stream(
            corpus.spec, worker.endpoint, from_step=6, cursors=cursors, cursor_step=cursor_step
        ) as rank,
    ):
        for batch in rank.take(4):
            for got, whole in zip(batch.lanes, expected[batch.step], strict=True):
                _same(got, whole)


def test_nothing_is_composed_before_its_seal_nor_beyond_the_credits(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    with (
        _served(corpus, tmp_path, sealed_through=1) as (served, (worker,)),
        whole_stream(corpus.spec, worker.endpoint, credits=4) as rank,
    ):
        assert [batch.step for batch in rank.take(2)] == [0, 1]
        assert worker.beat().composed_through == 1
        rank.credits.put(Credit(needed_step=2))
        _until(lambda: worker.beat().needed_step == 2)
        # New plans of an unsealed step are obeyed: nothing of it was composed.
        served.say(PlanEvent(generation=GENERATION, plans=(), sealed_through=9))
        assert [batch.step for batch in rank.take(2)] == [2, 3]
        assert worker.beat().composed_through == 3
        rank.credits.put(Credit(steps=2))
        assert [batch.step for batch in rank.take(2)] == [4, 5]
        assert worker.beat().needed_step == -1
        assert worker.stats().sequences_served == 6 * 16


def test_a_worker_goes_on_with_the_last_plan_only_when_a_rank_waits_and_the_controller_is_silent(
    tmp_path: Path,
) -> None:
    corpus = _corpus(tmp_path, degraded_after_s=0.3)
    expected = _direct(corpus, tmp_path, steps=4)
    with (
        _served(corpus, tmp_path, sealed_through=0) as (_, (worker,)),
        whole_stream(corpus.spec, worker.endpoint) as rank,
    ):
        assert not rank.take(1)[0].degraded
        rank.credits.put(Credit(needed_step=2))
        degraded = rank.take(2)
        assert [(batch.step, batch.degraded) for batch in degraded] == [(1, True), (2, True)]
        for got, whole in zip(degraded[1].lanes, expected[2], strict=True):
            _same(got, whole)
        beat = worker.beat()
        assert (beat.composed_through, beat.degraded_steps) == (2, 2)


def test_a_stream_of_an_old_generation_is_refused_and_ends_when_a_new_one_begins(
    tmp_path: Path,
) -> None:
    corpus = _corpus(tmp_path)
    with _served(corpus, tmp_path) as (served, (worker,)):
        with whole_stream(corpus.spec, worker.endpoint) as rank:
            rank.take(2)
            served.say(_begin(corpus, sealed_through=1, generation=2))
            with pytest.raises(StaleGeneration, match="generation 1 has ended, 2 is the newest"):
                rank.take(9)
        with (
            whole_stream(corpus.spec, worker.endpoint) as late,
            pytest.raises(StaleGeneration, match="generation 1 has ended"),
        ):
            late.take(1)


def test_a_stream_that_comes_before_word_of_its_generation_waits_for_it(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    with (
        _served(corpus, tmp_path, sealed_through=-1) as (served, (worker,)),
        whole_stream(corpus.spec, worker.endpoint) as rank,
    ):
        served.say(_begin(corpus, sealed_through=0))
        assert rank.take(1)[0].step == 0


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"run_id": "other"}, WrongRun, "serves run 'test', not 'other'"),
        ({"first_slot": 3, "end_slot": 99}, InvalidMessage, r"slots \[3, 99\); a step has 16"),
        ({"first_slot": 12}, InvalidMessage, "lane 0 of 4 has none of rank 0's slots"),
        (
            {"cursors": {Lane(0): np.zeros((2, 3), np.uint32)}, "cursor_steps": {Lane(0): Step(0)}},
            InvalidMessage,
            "lane 0",
        ),
        (
            {
                "cursors": {Lane(0): np.full((3, 3), 77, np.uint32)},
                "cursor_steps": {Lane(0): Step(0)},
            },
            InvalidMessage,
            "lane 0 names window 77 of epoch 77",
        ),
        (
            {
                "cursors": {Lane(0): np.zeros((3, 3), np.uint32)},
                "cursor_steps": {Lane(0): Step(5)},
            },
            InvalidMessage,
            "stands at step 5, after step 0",
        ),
    ],
)
def test_a_request_that_does_not_fit_the_run_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, object], error: type[HeadraceError], sentence: str
) -> None:
    corpus = _corpus(tmp_path)
    with (
        _served(corpus, tmp_path) as (_, (worker,)),
        whole_stream(corpus.spec, worker.endpoint, **changes) as rank,
        pytest.raises(error, match=sentence),
    ):
        rank.take(1)


def _controller(corpus: _Corpus, **changes: int) -> ScriptedController:
    spec = make_spec(corpus.index, corpus.tokenizer, **changes) if changes else corpus.spec
    return ScriptedController(spec, index=corpus.index.to_parquet(), tokenizer=corpus.tokenizer)


def test_a_worker_outlives_its_controller_and_enlists_with_the_next(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    with ExitStack() as stack:
        with ServedController(_controller(corpus)) as first:
            settings = WorkerSettings(controller=first.address, cache_dir=tmp_path / "cache")
            worker = stack.enter_context(Worker(settings, stop=threading.Event()))
            worker.wait_ready(timeout_s=20)
            first.say(_begin(corpus, sealed_through=3))
            rank = stack.enter_context(whole_stream(corpus.spec, worker.endpoint))
            rank.take(4)
        second = _controller(corpus)
        served = stack.enter_context(ServedController(second, address=first.address))
        served.say(_begin(corpus, sealed_through=6))
        assert [batch.step for batch in rank.take(3)] == [4, 5, 6]
        _until(lambda: bool(second.beats))
        assert second.beats[-1].endpoint == worker.endpoint


def test_a_worker_of_one_run_does_not_serve_another(tmp_path: Path) -> None:
    corpus, stop = _corpus(tmp_path), threading.Event()
    with ExitStack() as stack:
        with ServedController(_controller(corpus)) as first:
            settings = WorkerSettings(controller=first.address, cache_dir=tmp_path / "cache")
            worker = stack.enter_context(Worker(settings, stop=stop))
            worker.wait_ready(timeout_s=20)
        stack.enter_context(ServedController(_controller(corpus, seed=99), address=first.address))
        assert stop.wait(20)
        with pytest.raises(WrongRun, match="start the worker again"):
            worker.check()


def test_an_index_that_is_not_the_runs_stops_the_worker(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    controller = ScriptedController(
        corpus.spec, index=corpus.index.to_parquet() + b"x", tokenizer=corpus.tokenizer
    )
    with (
        ServedController(controller) as served,
        Worker(
            WorkerSettings(controller=served.address, cache_dir=tmp_path / "cache"),
            stop=threading.Event(),
        ) as worker,
        pytest.raises(IndexMismatch, match="not the one that the run names"),
    ):
        worker.wait_ready(timeout_s=20)


def test_a_worker_that_finds_no_controller_says_where_it_looked(tmp_path: Path) -> None:
    settings = WorkerSettings(controller="127.0.0.1:9", cache_dir=tmp_path / "cache")
    with (
        Worker(settings, stop=threading.Event()) as worker,
        pytest.raises(NotReady, match=r"no run from the controller at 127.0.0.1:9 within"),
    ):
        worker.wait_ready(timeout_s=0.2)


def test_a_stopped_worker_ends_its_streams(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    with _served(corpus, tmp_path, sealed_through=2) as (_, (worker,)):
        rank = whole_stream(corpus.spec, worker.endpoint)
        rank.take(3)
    with rank, pytest.raises((NotReady, WorkerUnreachable)):
        rank.take(1)


def test_a_shard_that_changed_since_the_index_is_left_out_and_the_stream_goes_on(
    tmp_path: Path,
) -> None:
    corpus = _corpus(tmp_path)
    damaged = tmp_path / "code" / "0001.tar"
    data = bytearray(damaged.read_bytes())
    data[600] ^= 1
    damaged.write_bytes(data)
    with (
        _served(corpus, tmp_path) as (served, (worker,)),
        whole_stream(corpus.spec, worker.endpoint) as rank,
    ):
        rank.take(10)
        beats = served.controller.beats
        _until(lambda: any(beat.quarantines for beat in beats))
        (left_out,) = [one for beat in beats for one in beat.quarantines]
    assert (left_out.domain, left_out.sample) == ("code", -1)
    assert left_out.shard == str(damaged)
    assert "other bytes than when the dataset index was built" in left_out.reason


@pytest.mark.slow
def test_a_worker_process_serves_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    controller = _controller(corpus)
    with ServedController(controller) as served:
        served.say(_begin(corpus, sealed_through=9))
        command = [sys.executable, "-m", "loader_workers", "--controller", served.address]
        process = subprocess.Popen(
            [*command, "--cache", str(tmp_path / "cache"), "--worker-id", "w7"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        with process:
            try:
                assert process.stdout is not None
                endpoint = process.stdout.readline().strip()
                with whole_stream(corpus.spec, endpoint) as rank:
                    assert len(rank.take(3)) == 3
                assert controller.beats[0].worker_id == "w7"
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
            finally:
                process.kill()


def _until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Wait for something that another thread brings about."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        pause.wait(0.01)
