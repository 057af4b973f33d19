"""The laws of windows and lanes: what is delivered, and from where it goes on."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_workers.composer import Composer
from loader_workers.index import build_index
from loader_workers.lane import LaneReader
from loader_workers.reference import Reference, expected_sequences
from loader_workers.source import WindowSource
from protos.dataset_index import DatasetIndex
from protos.documents import DocumentStarts
from protos.errors import DomainEmpty, InvalidMessage
from protos.planbook import PlanBook
from protos.slots import lane_counts
from protos.spec import PACKINGS, RunSpec
from protos.types import Lane, LaneBatch, Step
from tests.fakes_loader import make_source, make_spec, scripted_plans, write_token_shards

FEW = settings(max_examples=25, deadline=None)


@contextmanager
def _token_corpus(
    lengths: Sequence[Sequence[Sequence[int]]], **changes: Any
) -> Iterator[tuple[RunSpec, DatasetIndex, WindowSource]]:
    """Open domains of token shards; no token but 0, the end of text, occurs twice."""
    with tempfile.TemporaryDirectory() as folder:
        patterns, token = {}, 1
        for number, shards in enumerate(lengths):
            name = f"domain{number}"
            patterns[name] = [write_token_shards(Path(folder), name, shards, first_token=token)]
            token += sum(map(sum, shards))
        index = build_index(patterns, text_field="text", max_bad_share=0.0)
        spec = make_spec(index, vocab_size=max(token, 2), eot_id=0, **changes)
        with make_source(spec, index, Path(folder) / "cache") as source:
            yield spec, index, source


_SHARDS = st.lists(
    st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40]), min_size=1, max_size=12),
    min_size=1,
    max_size=5,
)


@FEW
@given(
    shards=_SHARDS,
    lanes=st.integers(1, 4),
    interleave=st.integers(1, 3),
    per_part=st.integers(1, 4),
    length=st.integers(1, 20),
)
def test_every_token_is_delivered_exactly_once_an_epoch(
    shards: list[list[int]], lanes: int, interleave: int, per_part: int, length: int
) -> None:
    changes = {
        "lanes": lanes,
        "global_sequences": lanes,
        "interleave": interleave,
        "window_samples": interleave * per_part,
        "sequence_length": length,
    }
    with _token_corpus([[*shards, [3] * lanes]], **changes) as (spec, index, source):
        reference = Reference(spec, index, None)
        for lane in map(Lane, range(lanes)):
            labels: Counter[int] = Counter()
            firsts: set[int] = set()
            expected: Counter[int] = Counter()
            for window in range(reference.num_windows("domain0", lane, 0)):
                documents = reference.documents("domain0", lane, 0, window)
                joined = [t for d in documents for t in [0, *d.tolist()]][1:]
                expected.update(joined[1:])
                firsts.update(joined[:1])
                opened = source.open(0, lane, 0, window)
                tokens, num_tokens = opened.take(0, len(opened))
                for row, count in zip(tokens.tolist(), num_tokens.tolist(), strict=True):
                    assert 1 <= count <= length + 1
                    assert row[count:] == [0] * (length + 1 - count)
                    labels.update(row[1:count])
            assert labels == expected
            # Of all tokens of the lane only each window's first is never trained on.
            assert not firsts & set(labels)


@pytest.mark.parametrize("packing", PACKINGS)
@FEW
@given(shards=_SHARDS, lanes=st.integers(1, 3), length=st.integers(1, 20))
def test_a_window_is_what_the_plain_reference_says(
    packing: str, shards: list[list[int]], lanes: int, length: int
) -> None:
    changes = {
        "lanes": lanes,
        "global_sequences": lanes,
        "sequence_length": length,
        "packing": packing,
    }
    with _token_corpus([[*shards, [3] * lanes]], **changes) as (spec, index, source):
        for lane in map(Lane, range(lanes)):
            for epoch in (0, 2):
                opened = source.open(0, lane, epoch, 0)
                tokens, num_tokens = opened.take(0, len(opened))
                expected = expected_sequences(spec, index, None, "domain0", lane, epoch, 0)
                np.testing.assert_array_equal(tokens, expected[0])
                np.testing.assert_array_equal(num_tokens, expected[1])
                assert tokens.dtype == spec.token_dtype == expected[0].dtype
                owned = Reference(spec, index, None).owned_sequences("domain0", lane, epoch, 0)
                starts = opened.document_starts(0, len(opened))
                assert [each.tolist() for each in starts] == [
                    [at for at in range(1, len(row)) if row[at][1] != row[at - 1][1]]
                    for row in owned
                ]


_CORPUS = [[[5, 0, 9, 30], [1, 1, 1], [12, 40, 3, 7]], [[60, 2], [25, 25, 25, 1]]]


def _run(
    spec: RunSpec,
    source: WindowSource,
    book: PlanBook,
    *,
    lanes: Sequence[int],
    steps: range,
    cursors: dict[Lane, np.ndarray] | None = None,
    slots: tuple[int, int] | None = None,
) -> list[tuple[LaneBatch, ...]]:
    zeros = np.zeros((spec.num_domains, 3), np.uint32)
    first, end = slots or (0, spec.global_sequences)
    composer = Composer(
        source,
        cursors or {Lane(lane): zeros for lane in lanes},
        first_slot=first,
        end_slot=end,
        documents=True,
    )
    batches = [composer.compose(Step(step), book.counts(Step(step))) for step in steps]
    composer.close()
    return batches


def _same(one: LaneBatch, other: LaneBatch) -> None:
    assert (one.lane, one.first_slot) == (other.lane, other.first_slot)
    for name in ("tokens", "domain_ids", "num_tokens", "places", "cursor_after"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    if one.documents is not None and other.documents is not None:
        np.testing.assert_array_equal(one.documents.counts, other.documents.counts)
        np.testing.assert_array_equal(one.documents.positions, other.documents.positions)
        one.documents.check_within(one.num_tokens)


def _book(spec: RunSpec) -> PlanBook:
    book = PlanBook(global_sequences=spec.global_sequences)
    for plan in scripted_plans(spec, {0: [0.5, 0.5], 3: [0.9, 0.1], 6: [0, 1], 9: [0.3, 0.7]}):
        book.add(plan)
    return book


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_lane_goes_on_from_its_cursor_at_every_position(packing: str) -> None:
    layout = {"lanes": 2, "global_sequences": 6, "sequence_length": 8, "packing": packing}
    with _token_corpus(_CORPUS, **layout) as (
        spec,
        _,
        source,
    ):
        book = _book(spec)
        whole = _run(spec, source, book, lanes=[0, 1], steps=range(14))
        for stop in range(1, 14):
            cursors = {batch.lane: batch.cursor_after for batch in whole[stop - 1]}
            rest = _run(spec, source, book, lanes=[0, 1], steps=range(stop, 14), cursors=cursors)
            for expected, got in zip(whole[stop:], rest, strict=True):
                for one, other in zip(expected, got, strict=True):
                    _same(one, other)


@pytest.mark.parametrize("slots", [(0, 6), (1, 5)])
@pytest.mark.parametrize("sizes", [[14], [1, 2, 3, 8], [5, 5, 1, 3]])
def test_steps_composed_together_are_the_same_as_one_by_one(
    sizes: list[int], slots: tuple[int, int]
) -> None:
    with _token_corpus(_CORPUS, lanes=2, global_sequences=6, sequence_length=8) as (
        spec,
        _,
        source,
    ):
        book = _book(spec)
        one_by_one = _run(spec, source, book, lanes=[0, 1], steps=range(14), slots=slots)
        zeros = np.zeros((2, 3), np.uint32)
        composer = Composer(
            source,
            {Lane(0): zeros, Lane(1): zeros},
            first_slot=slots[0],
            end_slot=slots[1],
            documents=True,
        )
        step = 0
        for size in sizes:
            counts = np.stack([book.counts(Step(step + index)) for index in range(size)])
            together = composer.compose_steps(Step(step), counts)
            for lane in together:
                assert lane.num_steps == size
                for index in range(size):
                    assert lane.documents is not None
                    _same(one_by_one[step + index][lane.lane], lane.at(index))
            step += size
        composer.close()


def test_a_place_is_a_function_of_the_last_sequence_however_it_was_reached() -> None:
    with _token_corpus(_CORPUS, lanes=2, sequence_length=8) as (spec, _, source):
        zeros = np.zeros((2, 3), np.uint32)
        one_by_one = LaneReader(source, Lane(1), zeros)
        for count in range(1, 30):
            one_by_one.take(0, 1)
            at_once, skipped = (LaneReader(source, Lane(1), zeros) for _ in range(2))
            at_once.take(0, count)
            skipped.skip(0, count)
            epoch, window, sequence = one_by_one.places()[0].tolist()
            # Never the end of a window, which is the start of the next one.
            assert sequence < len(source.open(0, Lane(1), epoch, window))
            np.testing.assert_array_equal(one_by_one.places(), at_once.places())
            np.testing.assert_array_equal(one_by_one.places(), skipped.places())


def test_winding_forward_is_composing_without_looking() -> None:
    with _token_corpus(_CORPUS, lanes=2, global_sequences=6, sequence_length=8) as (
        spec,
        _,
        source,
    ):
        book = _book(spec)
        whole = _run(spec, source, book, lanes=[0, 1], steps=range(12))
        for start in range(0, 9, 4):
            cursors = {
                batch.lane: batch.cursor_after if start else np.zeros((2, 3), np.uint32)
                for batch in whole[start - 1]
            }
            composer = Composer(source, cursors, first_slot=0, end_slot=6)
            for step in range(start, 11):
                counts = lane_counts(
                    book.counts(Step(step)), lanes=2, seed=spec.seed, step=Step(step)
                )
                composer.wind({lane: counts[lane] for lane in cursors})
            for one, other in zip(
                whole[11], composer.compose(Step(11), book.counts(Step(11))), strict=True
            ):
                _same(one, other)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]]])
def test_which_worker_serves_a_lane_does_not_matter(split: list[list[int]], packing: str) -> None:
    corpus = [[[9, 4, 6, 8, 30, 5, 2, 7], [3] * 9], [[21, 2, 9, 9], [4] * 6]]
    layout = {"lanes": 4, "global_sequences": 12, "sequence_length": 8, "packing": packing}
    with _token_corpus(corpus, **layout) as (
        spec,
        _,
        source,
    ):
        book = _book(spec)
        whole = _run(spec, source, book, lanes=range(4), steps=range(8))
        for lanes in split:
            part = _run(spec, source, book, lanes=lanes, steps=range(8))
            for expected, got in zip(whole, part, strict=True):
                for batch in got:
                    _same(expected[batch.lane], batch)


@pytest.mark.parametrize("packing", PACKINGS)
def test_two_ranks_that_share_a_lane_get_its_parts_and_the_same_cursor(packing: str) -> None:
    corpus = [[[9, 4, 6, 8, 30, 5, 2, 7]], [[21, 2, 9, 9]]]
    layout = {"lanes": 2, "global_sequences": 6, "sequence_length": 8, "packing": packing}
    with _token_corpus(corpus, **layout) as (spec, _, source):
        book = _book(spec)
        whole = _run(spec, source, book, lanes=[0, 1], steps=range(5))
        left = _run(spec, source, book, lanes=[0, 1], steps=range(5), slots=(0, 4))
        right = _run(spec, source, book, lanes=[1], steps=range(5), slots=(4, 6))
        for step in range(5):
            assert [len(batch.domain_ids) for batch in left[step]] == [3, 1]
            (tail,) = right[step]
            assert tail.first_slot == 4
            joined = np.concatenate([left[step][1].tokens, tail.tokens])
            np.testing.assert_array_equal(joined, whole[step][1].tokens)
            parts = [each.documents for each in (left[step][1], tail) if each.documents]
            documents = whole[step][1].documents
            assert documents is not None
            np.testing.assert_array_equal(DocumentStarts.join(parts).positions, documents.positions)
            np.testing.assert_array_equal(tail.cursor_after, whole[step][1].cursor_after)


def test_a_lane_without_tokens_says_so_and_does_not_search_for_ever() -> None:
    with (
        _token_corpus([[[0, 0, 0, 0]]], lanes=2) as (_, _, source),
        pytest.raises(DomainEmpty, match=r"lane 1 found no tokens in domain domain0 .* give"),
    ):
        LaneReader(source, Lane(1), np.zeros((1, 3), np.uint32)).take(0, 1)


def test_a_domain_with_fewer_samples_than_lanes_says_so() -> None:
    with (
        _token_corpus([[[5, 5]]], lanes=4, global_sequences=4) as (_, _, source),
        pytest.raises(DomainEmpty, match="more samples than the run has lanes"),
    ):
        LaneReader(source, Lane(0), np.zeros((1, 3), np.uint32)).take(0, 1)


def test_a_cursor_of_another_index_is_refused_in_one_sentence() -> None:
    places = np.array([[0, 99, 0], [0, 0, 0]], np.uint32)
    with (
        _token_corpus(_CORPUS, lanes=2) as (_, _, source),
        pytest.raises(InvalidMessage, match=r"lane 0 names window 99 of epoch 0 of domain domain0"),
    ):
        LaneReader(source, Lane(0), places)


def test_a_cursor_at_the_end_of_a_window_is_taken_as_the_start_of_the_next() -> None:
    with _token_corpus(_CORPUS, lanes=2, sequence_length=8) as (_, _, source):
        end = len(source.open(0, Lane(0), 0, 0))
        at_end = LaneReader(source, Lane(0), np.array([[0, 0, end], [0, 0, 0]], np.uint32))
        wound = LaneReader(source, Lane(0), np.zeros((2, 3), np.uint32))
        wound.skip(0, end)
        np.testing.assert_array_equal(at_end.take(0, 3).tokens, wound.take(0, 3).tokens)
        np.testing.assert_array_equal(at_end.places(), wound.places())
