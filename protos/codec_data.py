"""Our types <-> messages, for the batches: token bytes are viewed, never copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.codec_common import (
    array_from_bytes,
    checked,
    cursors_from_proto,
    cursors_to_proto,
    places_from_bytes,
    places_to_bytes,
)
from protos.documents import DocumentStarts, starts_dtype
from protos.types import Credit, Generation, Lane, LaneBatch, OpenStream, Rank, Step, StepBatch
from protos.wire import data_pb2 as data

_DOMAIN_IDS = np.dtype("<u2")
_NUM_TOKENS = np.dtype("<u4")


def open_stream_to_proto(opening: OpenStream) -> data.StreamBatchesRequest:
    """Encode the opening of a stream."""
    message = data.OpenStream(
        run_id=opening.run_id,
        generation=opening.generation,
        rank=opening.rank,
        from_step=opening.from_step,
        first_slot=opening.first_slot,
        end_slot=opening.end_slot,
        cursors=cursors_to_proto(opening.cursors, opening.cursor_steps),
        credits=opening.credits,
        documents=opening.documents,
        most_steps=opening.most_steps,
    )
    return data.StreamBatchesRequest(open=message)


@checked
def open_stream_from_proto(request: data.StreamBatchesRequest) -> OpenStream:
    """Decode the opening of a stream."""
    if not request.HasField("open"):
        raise ValueError("the first request must open the stream")
    message = request.open
    cursors, steps = cursors_from_proto(message.cursors)
    return OpenStream(
        run_id=message.run_id,
        generation=Generation(message.generation),
        rank=Rank(message.rank),
        from_step=Step(message.from_step),
        first_slot=message.first_slot,
        end_slot=message.end_slot,
        cursors=cursors,
        cursor_steps=steps,
        credits=message.credits,
        documents=message.documents,
        most_steps=max(message.most_steps, 1),
    )


def credit_to_proto(credit: Credit) -> data.StreamBatchesRequest:
    """Encode a credit."""
    message = data.Credit(steps=credit.steps, needed_step=credit.needed_step)
    return data.StreamBatchesRequest(credit=message)


@checked
def credit_from_proto(request: data.StreamBatchesRequest) -> Credit:
    """Decode a credit."""
    if not request.HasField("credit"):
        raise ValueError("a stream is opened once; later requests must be credits")
    return Credit(steps=request.credit.steps, needed_step=request.credit.needed_step)


def step_batch_to_proto(batch: StepBatch) -> data.StreamBatchesResponse:
    """Encode one stream's part of some steps; tokens go in the dtype that they have."""
    return data.StreamBatchesResponse(
        step=batch.step,
        plan_version=batch.plan_version,
        degraded=batch.degraded,
        lanes=[_lane_batch_to_proto(lane) for lane in batch.lanes],
        num_steps=batch.num_steps,
    )


@checked
def step_batch_from_proto(
    message: data.StreamBatchesResponse, *, token_dtype: np.dtype[Any], sequence_length: int
) -> StepBatch:
    """Decode one stream's part of one or more steps."""
    num_steps = max(message.num_steps, 1)
    return StepBatch(
        step=Step(message.step),
        plan_version=message.plan_version,
        degraded=message.degraded,
        lanes=tuple(
            _lane_batch_from_proto(lane, token_dtype, sequence_length, num_steps)
            for lane in message.lanes
        ),
        num_steps=num_steps,
    )


def _lane_batch_to_proto(batch: LaneBatch) -> data.LaneBatch:
    message = data.LaneBatch(
        lane=batch.lane,
        first_slot=batch.first_slot,
        num_sequences=len(batch.tokens),
        tokens=np.ascontiguousarray(batch.tokens).tobytes(),
        domain_ids=np.ascontiguousarray(batch.domain_ids, _DOMAIN_IDS).tobytes(),
        num_tokens=np.ascontiguousarray(batch.num_tokens, _NUM_TOKENS).tobytes(),
        places=places_to_bytes(batch.places),
        cursor_after=places_to_bytes(batch.cursor_after),
        earlier_cursors=b""
        if batch.earlier_cursors is None
        else places_to_bytes(batch.earlier_cursors),
    )
    if batch.documents is not None:
        dtype = starts_dtype(batch.tokens.shape[1] - 1)
        message.document_starts = batch.documents.positions.astype(dtype).tobytes()
        message.document_counts = batch.documents.counts.astype(dtype).tobytes()
    return message


def _lane_batch_from_proto(
    message: data.LaneBatch, token_dtype: np.dtype[Any], sequence_length: int, num_steps: int
) -> LaneBatch:
    rows = message.num_sequences
    num_tokens = array_from_bytes(message.num_tokens, _NUM_TOKENS, (rows,))
    cursor_after = places_from_bytes(message.cursor_after)
    earlier = None
    if num_steps > 1:
        shape = (num_steps - 1, len(cursor_after), 3)
        earlier = array_from_bytes(message.earlier_cursors, _NUM_TOKENS, shape)
    return LaneBatch(
        lane=Lane(message.lane),
        first_slot=message.first_slot,
        tokens=array_from_bytes(message.tokens, token_dtype, (rows, sequence_length + 1)),
        domain_ids=array_from_bytes(message.domain_ids, _DOMAIN_IDS, (rows,)),
        num_tokens=num_tokens,
        places=array_from_bytes(message.places, _NUM_TOKENS, (rows, 3)),
        cursor_after=cursor_after,
        earlier_cursors=earlier,
        documents=_documents_from_proto(message, num_tokens, sequence_length),
    )


def _documents_from_proto(
    message: data.LaneBatch, num_tokens: NDArray[np.uint32], sequence_length: int
) -> DocumentStarts | None:
    if not message.document_counts and not message.document_starts:
        return None
    dtype = starts_dtype(sequence_length)
    counts = array_from_bytes(message.document_counts, dtype, (len(num_tokens),))
    positions = array_from_bytes(message.document_starts, dtype, (-1,))
    documents = DocumentStarts(counts=counts.astype(np.int64), positions=positions.astype(np.int64))
    documents.check_within(num_tokens)
    return documents
