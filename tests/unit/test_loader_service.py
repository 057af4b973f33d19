"""The data service on its own: credits, and the end of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from loader_workers.index import build_index
from loader_workers.service import LoaderService
from protos.errors import NotReady
from protos.spec import RunSpec
from protos.types import Credit, Generation, Lane, OpenStream, PlanEvent, Rank, Step, StepBatch
from tests.fakes_loader import (
    BlockingCredits,
    make_source,
    make_spec,
    scripted_plans,
    write_token_shards,
)

_MOMENT_S = 0.2
"""Long enough for a step to be composed many times over."""


@contextmanager
def serving_source(folder: Path) -> Iterator[tuple[RunSpec, LoaderService]]:
    pattern = write_token_shards(folder, "web", [[9] * 12, [5] * 9])
    index = build_index({"web": [pattern]}, text_field="text", max_bad_share=0)
    spec = make_spec(index, lanes=2, global_sequences=4)
    with make_source(spec, index, folder / "cache") as source:
        service = LoaderService()
        service.configure(source)
        service.hear(
            PlanEvent(
                generation=Generation(1),
                plans=scripted_plans(spec, {0: [1.0]}),
                sealed_through=99,
                reset=True,
            )
        )
        yield spec, service


def _opening(spec: RunSpec, *, credits: int) -> OpenStream:
    lanes = [Lane(lane) for lane in range(spec.lanes)]
    return OpenStream(
        run_id=spec.run_id,
        generation=Generation(1),
        rank=Rank(0),
        from_step=Step(0),
        first_slot=0,
        end_slot=spec.global_sequences,
        cursors=dict.fromkeys(lanes, np.zeros((1, 3), np.uint32)),
        cursor_steps=dict.fromkeys(lanes, Step(0)),
        credits=credits,
    )


def _waits(future: Future[StepBatch]) -> bool:
    try:
        future.result(_MOMENT_S)
    except TimeoutError:
        return True
    return False


def test_a_step_waits_for_its_credit(tmp_path: Path) -> None:
    credits = BlockingCredits()
    with serving_source(tmp_path) as (spec, service), ThreadPoolExecutor(1) as pool:
        stream = iter(service.stream_batches(_opening(spec, credits=2), credits))
        assert [next(stream).step for _ in range(2)] == [0, 1]
        third = pool.submit(next, stream)
        assert _waits(third)
        assert service.figures().composed_through == 1
        credits.put(Credit(steps=1))
        assert third.result(10).step == 2
        credits.end()


def test_a_stream_ends_when_its_rank_goes_away(tmp_path: Path) -> None:
    credits = BlockingCredits()
    with serving_source(tmp_path) as (spec, service), ThreadPoolExecutor(1) as pool:
        stream = iter(service.stream_batches(_opening(spec, credits=1), credits))
        next(stream)
        assert service.figures().open_streams == 1
        rest = pool.submit(list, stream)
        credits.end()
        assert rest.result(10) == []
        assert service.figures().open_streams == 0


def test_only_time_that_a_rank_waits_counts_as_stall(tmp_path: Path) -> None:
    credits = BlockingCredits()
    with serving_source(tmp_path) as (spec, service):
        stream = iter(service.stream_batches(_opening(spec, credits=9), credits))
        next(stream)
        assert service.figures().stall_s == 0
        credits.put(Credit(needed_step=50))
        while service.figures().stall_s == 0:
            next(stream)
            credits.put(Credit(steps=1, needed_step=50))
        credits.end()


def test_a_service_that_does_not_know_the_run_or_is_stopping_says_so(tmp_path: Path) -> None:
    with serving_source(tmp_path) as (spec, service):
        opening = _opening(spec, credits=1)
        with pytest.raises(NotReady, match="waiting for the run's settings"):
            next(iter(LoaderService().stream_batches(opening, BlockingCredits())))
        service.stop()
        with pytest.raises(NotReady, match="is stopping; ask again or ask another"):
            next(iter(service.stream_batches(opening, BlockingCredits())))
