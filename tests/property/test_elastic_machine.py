"""Joins, kills, resumes, plan changes and world sizes in any order: every step is the model's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loader_workers.index import build_index
from loader_workers.source import WindowSource
from protos.dataset_index import DatasetIndex
from protos.spec import PACKINGS
from protos.types import Mixture, Step
from tests.fakes_loader import make_source, make_spec, write_token_shards
from tests.fakes_order import Checkpoint, Model, RunInProcess

_MIXTURES = st.sampled_from(
    [(0.7, 0.2, 0.1), (0.0, 0.5, 0.5), (0.0, 0.0, 1.0), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0)]
).map(Mixture.from_shares)
_WORLD_SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 12])
_MOST_STEPS = 60


@pytest.fixture(scope="module", params=PACKINGS)
def corpus(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DatasetIndex, WindowSource]]:
    """Open three small domains, in which a step of one alone may end an epoch."""
    folder = tmp_path_factory.mktemp("corpus")
    lengths = {
        "web": [[30, 9, 0, 50], [12] * 9],
        "code": [[1, 2, 40], [33, 0, 0, 8]],
        "books": [[17] * 6],
    }
    patterns, token = {}, 1
    for name, shards in lengths.items():
        patterns[name] = [write_token_shards(folder, name, shards, first_token=token)]
        token += sum(map(sum, shards))
    index = build_index(patterns, text_field="text", max_bad_share=0.0)
    spec = make_spec(
        index,
        vocab_size=token,
        eot_id=0,
        lanes=4,
        global_sequences=12,
        window_samples=4,
        packing=request.param,
    )
    with make_source(spec, index, folder / "cache") as source:
        yield index, source


class Machine(RuleBasedStateMachine):
    """A run in this process beside its model."""

    index: DatasetIndex
    source: WindowSource

    @initialize(mixture=_MIXTURES, world_size=_WORLD_SIZES)
    def join(self, mixture: Mixture, world_size: int) -> None:
        self.model = Model(self.source.spec, self.index)
        self.run = RunInProcess(self.source, mixture)
        self.checkpoints: list[Checkpoint] = []
        self.run.add_worker()
        self.run.seal(2)
        self.run.begin(world_size, Step(0), [])

    @rule(num_steps=st.integers(1, 6), reported=st.booleans())
    def train(self, num_steps: int, reported: bool) -> None:
        for _ in range(num_steps):
            step = self.run.next_step
            if step > self.run.sealed_through:
                self.run.seal(2)
            while len(self.model.steps) <= step:
                self.model.add(self.run.mixture_at(len(self.model.steps)))
            assert self.run.train(reported=reported) == self.model.steps[step], f"step {step}"
        self.checkpoints.append(Checkpoint(self.run.next_step, self.run.cursors))

    @rule(data=st.data(), num_steps=st.integers(1, 3))
    def prefetch(self, data: st.DataObject, num_steps: int) -> None:
        rank = data.draw(st.sampled_from(self.run.ranks))
        self.run.prefetch(rank, data.draw(st.sampled_from(rank.streams)), num_steps)

    @precondition(lambda self: self.run.sealed_through < _MOST_STEPS)
    @rule(num_steps=st.integers(1, 5), mixture=st.none() | _MIXTURES)
    def seal(self, num_steps: int, mixture: Mixture | None) -> None:
        self.run.seal(num_steps, mixture)

    @precondition(lambda self: len(self.run.workers) < 4)
    @rule()
    def add_worker(self) -> None:
        self.run.add_worker()

    @rule(data=st.data())
    def kill_a_worker(self, data: st.DataObject) -> None:
        if len(self.run.workers) == 1:
            self.run.add_worker()
        last = len(self.run.workers) - 1
        self.run.lose_worker(data.draw(st.integers(0, last)))

    @precondition(lambda self: self.checkpoints)
    @rule(data=st.data(), world_size=_WORLD_SIZES, kept=st.sampled_from(["all", "first", "own"]))
    def resume(self, data: st.DataObject, world_size: int, kept: str) -> None:
        saved = data.draw(st.sampled_from(self.checkpoints))
        states = {
            "all": saved.cursors,
            "first": saved.cursors[:1],
            "own": saved.cursors[:world_size],
        }
        self.run.begin(world_size, saved.step, states[kept])

    @rule(world_size=_WORLD_SIZES)
    def begin_anew(self, world_size: int) -> None:
        self.run.begin(world_size, Step(0), [])

    @invariant()
    def every_rank_streams_each_of_its_lanes_once(self) -> None:
        for rank in self.run.ranks:
            assert sorted(lane for each in rank.streams for lane in each.lanes) == rank.lanes

    def teardown(self) -> None:
        self.run.close()


@pytest.mark.timeout(300)  # what it takes to make a failure small
def test_whatever_happens_the_global_batch_of_every_step_is_the_models(
    corpus: tuple[DatasetIndex, WindowSource],
) -> None:
    class OnCorpus(Machine):
        index, source = corpus

    run_state_machine_as_test(
        OnCorpus, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
