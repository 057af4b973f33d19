"""The laws of packing, and of which document a token belongs to, against a plain recomputation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_workers.convert import Documents as ShardDocuments
from loader_workers.order import WindowSamples
from loader_workers.packing import assign_best_fit
from loader_workers.token_shard import TokenShard
from loader_workers.window import Window
from protos.documents import DocumentStarts
from protos.spec import BEST_FIT, PACKINGS
from trainer_client.documents import find_documents, label_mask

_EOT = 0

_LENGTHS = st.lists(st.integers(0, 40), max_size=30)
_SEQUENCE_LENGTHS = st.integers(1, 20)

Owned = tuple[int, int, int]
"""A token, the number of its document, and its place there."""


def _own(lengths: Sequence[int]) -> list[list[Owned]]:
    """Return documents whose tokens are all different, each with its end-of-text."""
    documents, token = [], 1
    for number, length in enumerate(lengths):
        tokens = [*range(token, token + length), _EOT]
        documents.append([(each, number, place) for place, each in enumerate(tokens)])
        token += length
    return documents


def _expected(lengths: Sequence[int], length: int, packing: str) -> list[list[Owned]]:
    """Pack by the definition, slowly; empty documents leave no trace."""
    documents = [document for document in _own(lengths) if len(document) > 1]
    if packing != BEST_FIT:
        joined = [token for document in documents for token in document][:-1]
        starts = range(0, max(len(joined) - 1, bool(joined)), length)
        return [joined[start : start + length + 1] for start in starts]
    pieces = [
        document[start : start + length + 1]
        for document in documents
        for start in range(0, len(document) - 1, length)
    ]
    sequences: list[list[tuple[int, list[Owned]]]] = []
    for number, piece in sorted(enumerate(pieces), key=lambda each: (-len(each[1]), each[0])):
        room = [length + 1 - sum(len(held) for _, held in sequence) for sequence in sequences]
        fitting = [at for at, left in enumerate(room) if left >= len(piece)]
        if fitting:
            sequences[min(fitting, key=lambda at: (room[at], at))].append((number, piece))
        else:
            sequences.append([(number, piece)])
    return [[token for _, piece in sorted(sequence) for token in piece] for sequence in sequences]


def _window(lengths: Sequence[int], length: int, packing: str) -> tuple[Window, TokenShard]:
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    offsets = np.cumsum([0, *lengths]).astype("<u8")
    shard = TokenShard(ShardDocuments(offsets=offsets, tokens=tokens, unreadable=()))
    samples = WindowSamples(
        shards=np.zeros(len(lengths), dtype=np.int64), samples=np.arange(len(lengths))
    )
    window = Window(
        samples,
        {0: shard},
        sequence_length=length,
        packing=packing,
        eot_id=_EOT,
        dtype=np.dtype("<u2"),
    )
    return window, shard


@pytest.mark.parametrize("packing", PACKINGS)
@given(lengths=_LENGTHS, length=_SEQUENCE_LENGTHS)
def test_a_window_is_packed_as_the_plain_definition_says(
    packing: str, lengths: list[int], length: int
) -> None:
    window, shard = _window(lengths, length, packing)
    expected = _expected(lengths, length, packing)
    assert window.num_sequences == len(expected)
    every = np.arange(len(expected))[::-1].copy()
    gathered = window.gather(every, lambda: {0: shard})
    window.join({0: shard})
    for tokens, num_tokens in (gathered, window.gather(every, lambda: {})):
        for row, count, sequence in zip(
            tokens.tolist(), num_tokens.tolist(), reversed(expected), strict=True
        ):
            assert row[:count] == [token for token, _, _ in sequence]
            assert row[count:] == [_EOT] * (length + 1 - count)


@given(lengths=_LENGTHS, length=_SEQUENCE_LENGTHS)
def test_best_fit_divides_no_document_that_fits_and_predicts_every_token_but_the_first_once(
    lengths: list[int], length: int
) -> None:
    sequences = _expected(lengths, length, BEST_FIT)
    starts, num_tokens = _starts(lengths, length, BEST_FIT)
    mask = label_mask(starts, num_tokens, sequence_length=length).numpy()
    held_in: dict[int, set[int]] = {}
    predicted: Counter[tuple[int, int]] = Counter()
    for row, sequence in enumerate(sequences):
        assert len(sequence) <= length + 1
        for place, (_, document, at) in enumerate(sequence):
            held_in.setdefault(document, set()).add(row)
            if place and mask[row, place - 1]:
                # From the same document's token before, never from another document.
                assert sequence[place - 1][1:] == (document, at - 1)
                predicted[document, at] += 1
        assert not mask[row, max(len(sequence) - 1, 0) :].any()
    for number, size in enumerate(lengths):
        if 0 < size <= length:
            assert len(held_in[number]) == 1
    assert predicted == Counter(
        (number, at) for number, size in enumerate(lengths) if size for at in range(1, size + 1)
    )


@given(sizes=st.lists(st.integers(1, 50), max_size=200), capacity=st.integers(50, 60))
def test_no_sequence_is_overfull_and_at_most_one_is_half_empty(
    sizes: list[int], capacity: int
) -> None:
    sequences = assign_best_fit(np.array(sizes, dtype=np.int64), capacity=capacity)
    filled = np.bincount(sequences, weights=sizes, minlength=0)
    assert np.all(filled > 0)
    assert np.all(filled <= capacity)
    assert np.count_nonzero(2 * filled <= capacity) <= 1


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_best_fit_stays_within_eleven_ninths_of_the_fewest_sequences(sizes: list[int]) -> None:
    capacity = 20

    @cache
    def fewest(left: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not left:
            return len(rooms)
        size, rest = left[0], left[1:]
        ways = {tuple(sorted((*rooms, capacity - size)))}
        for at, room in enumerate(rooms):
            if room >= size:
                ways.add(tuple(sorted((*rooms[:at], room - size, *rooms[at + 1 :]))))
        return min(fewest(rest, way) for way in ways)

    used = int(assign_best_fit(np.array(sizes), capacity=capacity).max()) + 1
    assert 9 * used <= 11 * fewest(tuple(sorted(sizes, reverse=True)), ()) + 6


def _starts(
    lengths: Sequence[int], length: int, packing: str
) -> tuple[DocumentStarts, np.ndarray[tuple[int], np.dtype[np.uint32]]]:
    """Return what a worker sends of all sequences of a window."""
    window, shard = _window(lengths, length, packing)
    every = np.arange(window.num_sequences)
    starts = DocumentStarts.of(window.document_starts(every))
    num_tokens = window.gather(every, lambda: {0: shard})[1]
    starts.check_within(num_tokens)
    return starts, num_tokens


@pytest.mark.parametrize("packing", PACKINGS)
@settings(deadline=None)
@given(
    lengths=_LENGTHS.filter(any), length=_SEQUENCE_LENGTHS, data=st.data(), step=st.integers(1, 5)
)
def test_every_token_is_given_its_document_and_its_place_there(
    packing: str, lengths: list[int], length: int, data: st.DataObject, step: int
) -> None:
    sequences = _expected(lengths, length, packing)
    starts, num_tokens = _starts(lengths, length, packing)
    found = find_documents(starts, num_tokens, sequence_length=length)
    first = data.draw(st.integers(0, len(sequences) - 1))
    end = min(first + step, len(sequences))
    documents = found.rows(first, end)
    ids, positions = documents.document_ids.tolist(), documents.position_ids.tolist()
    lengths_of_segments = []
    for row, sequence in enumerate(sequences[first:end]):
        inputs: list[int | None] = [document for _, document, _ in sequence[:length]]
        inputs += [None] * (length - len(inputs))
        seen: list[int | None] = []
        for place, document in enumerate(inputs):
            if place == 0 or document != inputs[place - 1]:
                seen.append(document)
                lengths_of_segments.append(0)
            lengths_of_segments[-1] += 1
            assert ids[row][place] == (0 if document is None else len(seen))
            assert positions[row][place] == lengths_of_segments[-1] - 1
    assert documents.cu_seqlens.tolist() == np.cumsum([0, *lengths_of_segments]).tolist()
    assert documents.max_seqlen == max(lengths_of_segments)
    assert str(documents.cu_seqlens.dtype) == str(documents.document_ids.dtype) == "torch.int32"


_COUNTS = st.lists(st.integers(0, 2), max_size=3)


@given(
    counts=_COUNTS | st.lists(st.integers(-1, 4), max_size=4),
    positions=st.lists(st.integers(-1, 6), max_size=8),
    num_tokens=st.lists(st.integers(0, 6), max_size=4),
)
def test_starts_of_any_numbers_are_taken_only_if_they_are_sound(
    counts: list[int], positions: list[int], num_tokens: list[int]
) -> None:
    _check_taken(counts, positions, num_tokens)


@given(data=st.data(), counts=_COUNTS)
def test_starts_are_taken_only_if_they_rise_within_each_sequence_and_before_its_padding(
    data: st.DataObject, counts: list[int]
) -> None:
    each = st.integers(0, 7)
    positions = data.draw(st.lists(each, min_size=sum(counts), max_size=sum(counts)))
    num_tokens = data.draw(st.lists(each, min_size=len(counts), max_size=len(counts)))
    _check_taken(counts, positions, num_tokens)


def _check_taken(counts: list[int], positions: list[int], num_tokens: list[int]) -> None:
    try:
        starts = DocumentStarts(
            counts=np.array(counts, dtype=np.int64), positions=np.array(positions, dtype=np.int64)
        )
        starts.check_within(np.array(num_tokens, dtype=np.uint32))
    except ValueError:
        taken = False
    else:
        taken = True
    sound = min(counts, default=0) >= 0 and sum(counts) == len(positions)
    sound = sound and len(counts) == len(num_tokens)
    at = 0
    for count, limit in zip(counts, num_tokens, strict=False):
        each = positions[at : at + max(count, 0)]
        at += max(count, 0)
        sound = sound and each == sorted(set(each)) and all(0 < place < limit for place in each)
    assert taken == sound
