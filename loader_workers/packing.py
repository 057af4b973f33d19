"""How a window's documents lie in its sequences: a function of their lengths alone.

`concatenate` joins all documents with the end-of-text token between and cuts every
`sequence_length` tokens; a sequence holds one token more, which the next one begins with, so that
of the window's tokens only the first is never predicted.

`best_fit` divides no document that fits a sequence. A document and its end-of-text token are laid
down whole; one that is longer than a sequence is cut as above, by itself, so that only its own
first token is never predicted. Pieces share sequences by best-fit decreasing, as Ding et al. (2024,
"Fewer Truncations Improve Language Modeling", arXiv 2404.10830) propose; what no piece fits is
padding. Integers and ties by number, so that every machine packs alike.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from loader_workers.order import num_sequences
from protos.spec import BEST_FIT


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Layout:
    """Runs of documents' tokens along a row of places, and how sequences are cut from the row.

    What no run covers holds the end-of-text token: the ends of documents, and padding. Sequence i
    holds the `sequence_length + 1` places from i * stride on.
    """

    documents: NDArray[np.int64]
    """[runs]: the document that each run is of."""

    skipped: NDArray[np.int64]
    """[runs]: how many of the document's tokens come before."""

    lengths: NDArray[np.int64]
    """[runs]: tokens, 1 or more; the end-of-text token is none of them."""

    places: NDArray[np.int64]
    """[runs]: where each begins, rising."""

    stride: int
    num_tokens: NDArray[np.uint32]
    """[sequences]: how many places of each are not padding."""


def lay_out(lengths: NDArray[np.int64], *, sequence_length: int, packing: str) -> Layout:
    """Lay out documents of these lengths, each 1 or more, in the order in which they come."""
    if packing == BEST_FIT:
        return _best_fit(lengths, sequence_length)
    return _concatenate(lengths, sequence_length)


def _concatenate(lengths: NDArray[np.int64], sequence_length: int) -> Layout:
    ends = np.cumsum(lengths + 1)
    num_tokens = max(int(lengths.sum()) + len(lengths) - 1, 0)
    count = num_sequences(num_tokens, sequence_length=sequence_length)
    first = np.arange(count, dtype=np.int64) * sequence_length
    return Layout(
        documents=np.arange(len(lengths)),
        skipped=np.zeros(len(lengths), dtype=np.int64),
        lengths=lengths,
        places=ends - (lengths + 1),
        stride=sequence_length,
        num_tokens=np.minimum(num_tokens - first, sequence_length + 1).astype(np.uint32),
    )


def _best_fit(lengths: NDArray[np.int64], sequence_length: int) -> Layout:
    width = sequence_length + 1
    num_pieces = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), num_pieces)
    first_pieces = np.cumsum(num_pieces) - num_pieces
    skipped = (np.arange(len(documents)) - first_pieces[documents]) * sequence_length
    sizes = np.minimum(lengths[documents] + 1 - skipped, width)
    sequences = assign_best_fit(sizes, capacity=width)
    # Within a sequence pieces lie in the order of their documents, not of their sizes.
    order = np.argsort(sequences, kind="stable")
    documents, skipped, sizes, sequences = (
        array[order] for array in (documents, skipped, sizes, sequences)
    )
    num_tokens = np.zeros(int(sequences.max(initial=-1)) + 1, dtype=np.int64)
    np.add.at(num_tokens, sequences, sizes)
    filled_before = np.cumsum(num_tokens) - num_tokens
    offsets = np.cumsum(sizes) - sizes - filled_before[sequences]
    return Layout(
        documents=documents,
        skipped=skipped,
        lengths=np.minimum(lengths[documents] - skipped, sizes),
        places=sequences * width + offsets,
        stride=width,
        num_tokens=num_tokens.astype(np.uint32),
    )


def assign_best_fit(sizes: NDArray[np.int64], *, capacity: int) -> NDArray[np.int64]:
    """Return which sequence each piece goes to, by best-fit decreasing.

    The largest piece that is left, the first of equals, goes to the fullest sequence that has room
    for it, the first of equals, or else begins a new one. Time grows with n log n, and room with n.

    Args:
        sizes: [pieces] in 1 .. capacity.
        capacity: what a sequence holds.
    """
    by_size = np.argsort(-sizes, kind="stable")
    sequences = np.empty(len(sizes), dtype=np.int64)
    num_full = int(np.count_nonzero(sizes == capacity))
    sequences[by_size[:num_full]] = np.arange(num_full)
    count = num_full
    smallest = int(sizes.min(initial=capacity))
    # How much room sequences have left, each amount once and rising, and which have so much left.
    amounts: list[int] = []
    having: dict[int, list[int]] = {}
    assigned = []
    for size in sizes[by_size[num_full:]].tolist():
        at = bisect_left(amounts, size)
        if at == len(amounts):
            sequence, room = count, capacity - size
            count += 1
        else:
            amount = amounts[at]
            sequence, room = heappop(having[amount]), amount - size
            if not having[amount]:
                del having[amount], amounts[at]
        assigned.append(sequence)
        if room >= smallest:
            if room not in having:
                having[room] = []
                insort(amounts, room)
            heappush(having[room], sequence)
    sequences[by_size[num_full:]] = assigned
    return sequences
