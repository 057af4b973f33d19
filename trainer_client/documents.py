"""Which document each token of a micro-batch belongs to, in the forms that attention takes.

A document ends with its end-of-text token. Where sequences are cut from joined documents, what a
sequence has of a document counts as one: attention reaches no further back than the sequence.
Padding is a segment of its own, so that lengths add up and shapes stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from protos.documents import DocumentStarts


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Documents:
    """The documents in a micro-batch's `tokens`; what is predicted plays no part."""

    document_ids: torch.Tensor
    """[sequences, sequence_length] int32: 1, 2, ... in each sequence; 0 where there is padding"""

    position_ids: torch.Tensor
    """[sequences, sequence_length] int64: from 0 on in each document, and in the padding"""

    cu_seqlens: torch.Tensor
    """[segments + 1] int32: where documents and paddings begin in the flattened micro-batch, from
    0 to sequences x sequence_length, as `flash_attn_varlen_func` takes them for queries and keys"""

    max_seqlen: int
    """The longest of these segments; known on the host."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepDocuments:
    """The documents of a rank's whole step, from which those of its micro-batches are cut."""

    document_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    """Of the whole step, flattened."""

    row_segments: NDArray[np.int64]
    """[sequences + 1]: the first segment of each sequence, and the number of them all."""

    segment_lengths: NDArray[np.int64]

    def tensors(self) -> list[torch.Tensor]:
        """Return what goes to the device."""
        return [self.document_ids, self.position_ids, self.cu_seqlens]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> StepDocuments:
        """Return the same with each tensor moved."""
        return replace(
            self,
            document_ids=move(self.document_ids),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
        )

    def rows(self, first: int, end: int) -> Documents:
        """Return the documents of the sequences [first, end)."""
        segments = slice(self.row_segments[first], self.row_segments[end])
        width = self.document_ids.shape[1]
        return Documents(
            document_ids=self.document_ids[first:end],
            position_ids=self.position_ids[first:end],
            cu_seqlens=self.cu_seqlens[segments.start : segments.stop + 1] - first * width,
            max_seqlen=int(self.segment_lengths[segments].max()),
        )


def find_documents(
    starts: DocumentStarts, num_tokens: NDArray[np.uint32], *, sequence_length: int
) -> StepDocuments:
    """Work out the documents of some sequences' inputs.

    Args:
        starts: where documents begin.
        num_tokens: [sequences], those that are not padding; labels included.
        sequence_length: how many tokens of a sequence are inputs.
    """
    num_sequences = len(num_tokens)
    begins = np.zeros((num_sequences, sequence_length), dtype=np.bool_)
    begins[:, 0] = True
    # The last token is a label only: what begins there begins with the next sequence.
    inputs = starts.positions < sequence_length
    begins[starts.sequences()[inputs], starts.positions[inputs]] = True
    padded = np.flatnonzero(num_tokens < sequence_length)
    begins[padded, num_tokens[padded]] = True
    document_ids = np.cumsum(begins, axis=1, dtype=np.int32)
    for row in padded.tolist():
        document_ids[row, num_tokens[row] :] = 0
    first = np.flatnonzero(begins)
    ends = np.append(first, begins.size)
    lengths = np.diff(ends)
    positions = np.arange(begins.size)
    positions -= np.repeat(first, lengths)
    rows = np.arange(num_sequences + 1) * sequence_length
    return StepDocuments(
        document_ids=torch.from_numpy(document_ids),
        position_ids=torch.from_numpy(positions.reshape(begins.shape)),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        row_segments=np.searchsorted(first, rows),
        segment_lengths=lengths,
    )


def label_mask(
    starts: DocumentStarts, num_tokens: NDArray[np.uint32], *, sequence_length: int
) -> torch.Tensor:
    """Return [sequences, sequence_length]: False at padding and at each document's first token.

    For sequences whose documents met by chance: none says anything of how the next one begins.
    """
    mask = np.arange(1, sequence_length + 1)[None, :] < num_tokens[:, None]
    mask[starts.sequences(), starts.positions - 1] = False
    return torch.from_numpy(mask)
