"""What goes over the wire comes back as it was; what is not ours is refused in one sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from protos import codec, codec_admin, codec_common, codec_data
from protos.documents import DocumentStarts
from protos.errors import InvalidMessage
from protos.spec import ProbeSpec, RunSpec, ValidationSpec
from protos.status import RunStatus, ShadowStatus, WorkerStatus
from protos.types import (
    Beat,
    BlobChunk,
    Credit,
    Generation,
    JoinAnswer,
    JoinRequest,
    Lane,
    LaneBatch,
    LaneEndpoint,
    Mixture,
    OpenStream,
    Plan,
    PlanEvent,
    Quarantine,
    Rank,
    ReportAnswer,
    Resume,
    Step,
    StepBatch,
    StepReport,
    WorkerBeat,
)
from protos.wire import admin_pb2, control_pb2, data_pb2

SPEC = RunSpec(
    run_id="r",
    seed=2**63,
    domains=("web", "códe"),
    lanes=4,
    global_sequences=8,
    sequence_length=3,
    window_samples=8,
    interleave=4,
    num_steps=10,
    lag=2,
    vocab_size=70_000,
    eot_id=1,
    text_field="text",
    index_sha256="ab",
    tokenizer_sha256="cd",
    degraded_after_s=1.5,
    data_timeout_s=90.0,
    on_damage="quarantine_shard",
    samples_folder="/runs/é.samples",
    packing="best_fit",
    probe=ProbeSpec(
        layers=("a.*", "b"), seed=3, projection="gaussian", draw="run", part_norms=True
    ),
    validation=(
        ValidationSpec(every=5, period=40, span=15),
        ValidationSpec(every=2, period=2, span=2),
    ),
    needs_reference=True,
)
MIXTURE = Mixture.from_shares([1, 2])
PLAN = Plan(version=3, first_step=Step(7), mixture=MIXTURE, carry_q32=(-5, 5))
PLACES = np.array([[0, 1, 2], [3, 4, 2**32 - 1]], np.uint32)
CURSORS = {Lane(1): PLACES, Lane(3): PLACES + np.uint32(0)}
STEPS = {Lane(1): Step(4), Lane(3): Step(5)}
ENDPOINT = LaneEndpoint(lane=Lane(2), endpoint="127.0.0.1:1", worker_id="w")
QUARANTINE = Quarantine(domain="web", shard="s.tar", sample=-1, reason="torn")
BEAT = WorkerBeat(worker_id="w", endpoint="h:1", quarantines=(QUARANTINE,), needed_step=4)
REPORT = StepReport(
    generation=Generation(2),
    rank=Rank(1),
    step=Step(9),
    plan_version=3,
    sequences=np.array([1, 2]),
    tokens=np.array([10, 20]),
    loss_sum=np.array([1.5, 2.5]),
    alignment_part=np.array([[1.0, -2.0], [-2.0, 3.0]]),
    alignment_share=0.5,
    weight_norms=(1.0, 2.0),
    update_norms=(0.1, 0.2),
    validation_loss=np.array([3.25, 4.5]),
    excess_sum=np.array([0.0, 7.5]),
    part_square_norms=np.array([1e-9, 2.0]),
    num_parts=np.array([1, 2]),
    step_s=0.1,
    cursors=CURSORS,
)
STATUS = RunStatus(
    run_id="r",
    policy="acodm",
    policy_phase="warm-up",
    phase="running",
    domains=("web", "code"),
    mixture=MIXTURE,
    plan_version=3,
    observed_step=-1,
    sealed_through=1,
    num_steps=10,
    generation=2,
    world_size=2,
    loss=(1.0, 2.0),
    tokens=5,
    tokens_per_s=1.5,
    data_wait_share=0.1,
    data_wait_s=2.5,
    step_s=25.0,
    degraded_steps=0,
    missing_reports=1,
    held_decisions=2,
    decision_ms_p50=1.0,
    decision_ms_p99=2.0,
    frozen=True,
    quarantines=(QUARANTINE,),
    workers=(
        WorkerStatus(
            worker_id="w",
            endpoint="h:1",
            alive=True,
            lanes=(0, 1),
            cache_bytes=5,
            stall_s=0.5,
            sequences_served=6,
            silent_s=1.5,
        ),
    ),
    shadows=(
        ShadowStatus(name="odm", phase="acting", shares=(0.25, 0.75), fault=""),
        ShadowStatus(name="odm-2", phase="warm-up", shares=(), fault="late"),
    ),
)
JOIN = JoinRequest(
    rank=Rank(1),
    world_size=2,
    attempt_id="a",
    run_id="r",
    resume=Resume(order_sha256="ef", step=Step(50), cursors=CURSORS),
)
ANSWER = JoinAnswer(
    generation=Generation(4),
    spec=SPEC,
    first_step=Step(50),
    endpoints=(ENDPOINT,),
    cursors=CURSORS,
    cursor_steps=STEPS,
)
OPENING = OpenStream(
    run_id="r",
    generation=Generation(1),
    rank=Rank(0),
    from_step=Step(2),
    first_slot=0,
    end_slot=3,
    cursors=CURSORS,
    cursor_steps=STEPS,
    credits=3,
    documents=True,
)


def _batch(dtype: str, documents: DocumentStarts | None = None) -> StepBatch:
    lane = LaneBatch(
        lane=Lane(1),
        first_slot=2,
        tokens=np.arange(8).reshape(2, 4).astype(dtype),
        domain_ids=np.array([0, 1], np.uint16),
        num_tokens=np.array([4, 2], np.uint32),
        places=PLACES,
        cursor_after=PLACES,
        documents=documents,
    )
    return StepBatch(step=Step(5), plan_version=1, degraded=True, lanes=(lane,))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return bool(left.dtype == right.dtype and np.array_equal(left, right))
    if dataclasses.is_dataclass(left):
        names = [item.name for item in dataclasses.fields(left)]
        return all(_same(getattr(left, name), getattr(right, name)) for name in names)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


@pytest.mark.parametrize(
    ("value", "encode", "decode"),
    [
        (SPEC, codec_common.spec_to_proto, codec_common.spec_from_proto),
        (
            PlanEvent(generation=Generation(2), plans=(PLAN,), sealed_through=-1, reset=True),
            codec.plan_event_to_proto,
            codec.plan_event_from_proto,
        ),
        (JOIN, codec.join_request_to_proto, codec.join_request_from_proto),
        (ANSWER, codec.join_answer_to_proto, codec.join_answer_from_proto),
        (REPORT, codec.report_to_proto, codec.report_from_proto),
        (
            dataclasses.replace(
                REPORT,
                validation_loss=None,
                excess_sum=None,
                part_square_norms=None,
                num_parts=None,
            ),
            codec.report_to_proto,
            codec.report_from_proto,
        ),
        (
            ReportAnswer(
                plan_version=1, sealed_through=-1, counted=True, ledger_head="7:" + "a" * 64
            ),
            codec.report_answer_to_proto,
            codec.report_answer_from_proto,
        ),
        (BEAT, codec.worker_beat_to_proto, codec.worker_beat_from_proto),
        (SPEC, codec.enlist_event_to_proto, codec.enlist_event_from_proto),
        (Beat(drain=True), codec.enlist_event_to_proto, codec.enlist_event_from_proto),
        (
            BlobChunk(name="index", offset=1, total_bytes=9, data=b"xyz"),
            codec.enlist_event_to_proto,
            codec.enlist_event_from_proto,
        ),
        (OPENING, codec_data.open_stream_to_proto, codec_data.open_stream_from_proto),
        (
            Credit(steps=2, needed_step=-1),
            codec_data.credit_to_proto,
            codec_data.credit_from_proto,
        ),
        (STATUS, codec_admin.status_to_proto, codec_admin.status_from_proto),
    ],
)
def test_a_value_survives_the_wire(value: Any, encode: Any, decode: Any) -> None:
    message = encode(value)
    again = type(message).FromString(message.SerializeToString())
    assert _same(decode(again), value)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_batches_survive_the_wire_without_a_copy_of_the_tokens(dtype: str) -> None:
    message = codec_data.step_batch_to_proto(_batch(dtype))
    again = data_pb2.StreamBatchesResponse.FromString(message.SerializeToString())
    batch = codec_data.step_batch_from_proto(again, token_dtype=np.dtype(dtype), sequence_length=3)
    assert _same(batch, _batch(dtype))
    assert batch.lanes[0].tokens.base is not None


@pytest.mark.parametrize("sequences", [[[1, 3], []], [[], [1]], [[], []]])
def test_where_documents_begin_survives_the_wire(sequences: list[list[int]]) -> None:
    documents = DocumentStarts.of([np.array(each, dtype=np.int64) for each in sequences])
    message = codec_data.step_batch_to_proto(_batch("<u2", documents))
    again = data_pb2.StreamBatchesResponse.FromString(message.SerializeToString())
    batch = codec_data.step_batch_from_proto(again, token_dtype=np.dtype("<u2"), sequence_length=3)
    assert _same(batch, _batch("<u2", documents))


@pytest.mark.parametrize(
    ("counts", "positions", "sentence"),
    [
        ([1, 0], [4], "before its sequence's padding"),
        ([0, 1], [2], "before its sequence's padding"),
        ([1, 0], [0], "after a sequence's start"),
        ([2, 0], [3, 1], "each after the last"),
        ([2, 0], [2, 2], "each after the last"),
        ([2, 0], [2], "as many as were counted"),
        ([65535, 65535], [1], "as many as were counted"),
        ([1], [2], "bytes"),
        ([], [2], "bytes"),
    ],
)
def test_documents_that_begin_where_none_can_are_refused(
    counts: list[int], positions: list[int], sentence: str
) -> None:
    message = codec_data.step_batch_to_proto(_batch("<u2"))
    message.lanes[0].document_counts = np.array(counts, "<u2").tobytes()
    message.lanes[0].document_starts = np.array(positions, "<u2").tobytes()
    with pytest.raises(InvalidMessage, match=sentence):
        codec_data.step_batch_from_proto(message, token_dtype=np.dtype("<u2"), sequence_length=3)


@given(counts=st.binary(max_size=6), starts=st.binary(max_size=12))
def test_hostile_documents_are_refused_or_sound(counts: bytes, starts: bytes) -> None:
    message = codec_data.step_batch_to_proto(_batch("<u2"))
    message.lanes[0].document_counts, message.lanes[0].document_starts = counts, starts
    try:
        batch = codec_data.step_batch_from_proto(
            message, token_dtype=np.dtype("<u2"), sequence_length=3
        )
    except InvalidMessage:
        return
    documents = batch.lanes[0].documents
    assert documents is None or (documents.positions > 0).all()
    assert documents is None or (documents.positions < 4).all()


def test_an_older_controller_means_concatenation() -> None:
    message = codec_common.spec_to_proto(SPEC)
    message.packing = ""
    assert codec_common.spec_from_proto(message).packing == "concatenate"
    message.packing = "knapsack"
    with pytest.raises(InvalidMessage, match="packing must be one of concatenate, best_fit"):
        codec_common.spec_from_proto(message)


def test_batches_of_another_shape_are_refused() -> None:
    message = codec_data.step_batch_to_proto(_batch("<u2"))
    with pytest.raises(InvalidMessage, match="bytes"):
        codec_data.step_batch_from_proto(message, token_dtype=np.dtype("<u4"), sequence_length=3)


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (control_pb2.JoinRequest(rank=2, world_size=2, attempt_id="a"), "join_request"),
        (control_pb2.JoinRequest(rank=0, world_size=2), "join_request"),
        (
            control_pb2.JoinRequest(world_size=1, attempt_id="a", timeout_s=float("nan")),
            "join_request",
        ),
        (control_pb2.ReportRequest(sequences=[2**64 - 1]), "report"),
        (control_pb2.ReportRequest(sequences=[1], alignment_part=b"123"), "report"),
        (control_pb2.ReportRequest(step=2**63), "report"),
        (control_pb2.ReportRequest(num_parts=[2**64 - 1]), "report"),
        (control_pb2.EnlistRequest(worker_id=""), "worker_beat"),
        (control_pb2.EnlistRequest(worker_id="w", endpoint="e", stall_s=-1.0), "worker_beat"),
        (control_pb2.EnlistResponse(), "enlist_event"),
    ],
)
def test_a_field_out_of_bounds_is_refused(message: Message, decode: str) -> None:
    with pytest.raises(InvalidMessage):
        getattr(codec, f"{decode}_from_proto")(message)


DECODERS: list[tuple[type[Message], Any]] = [
    (control_pb2.JoinRequest, codec.join_request_from_proto),
    (control_pb2.JoinResponse, codec.join_answer_from_proto),
    (control_pb2.ReportRequest, codec.report_from_proto),
    (control_pb2.WatchPlansResponse, codec.plan_event_from_proto),
    (control_pb2.EnlistRequest, codec.worker_beat_from_proto),
    (control_pb2.EnlistResponse, codec.enlist_event_from_proto),
    (data_pb2.StreamBatchesRequest, codec_data.open_stream_from_proto),
    (admin_pb2.StatusResponse, codec_admin.status_from_proto),
]


@pytest.mark.parametrize(("kind", "decode"), DECODERS)
@given(noise=st.binary(max_size=200), cut=st.integers(0, 400))
def test_hostile_bytes_are_refused_and_nothing_worse(
    kind: type[Message], decode: Any, noise: bytes, cut: int
) -> None:
    samples = [codec.join_request_to_proto(JOIN), codec.report_to_proto(REPORT)]
    for data in [noise, *(sample.SerializeToString()[:cut] + noise for sample in samples)]:
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        try:
            decode(message)
        except InvalidMessage:
            continue
