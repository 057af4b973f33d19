"""Our types <-> messages, for what Control carries; what is wrong raises InvalidMessage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.codec_common import (
    array_from_bytes,
    checked,
    cursors_from_proto,
    cursors_to_proto,
    endpoint_from_proto,
    endpoint_to_proto,
    field_names,
    plan_from_proto,
    plan_to_proto,
    quarantine_from_proto,
    quarantine_to_proto,
    spec_from_proto,
    spec_to_proto,
)
from protos.spec import RunSpec
from protos.types import (
    AloneSteps,
    Beat,
    BlobChunk,
    EnlistEvent,
    Generation,
    JoinAnswer,
    JoinRequest,
    Lane,
    LaneTable,
    PlanEvent,
    Rank,
    ReportAnswer,
    Resume,
    Step,
    StepReport,
    WorkerBeat,
)
from protos.wire import control_pb2 as control

_FLOATS = np.dtype("<f8")
_MAX_INT64 = (1 << 63) - 1

MAX_NAME = 1_000
"""Characters of a worker's, a rank's or an endpoint's name."""

MAX_JOIN_S = 86_400.0
"""How long a rank may ask to wait for the others."""


def plan_event_to_proto(event: PlanEvent) -> control.WatchPlansResponse:
    """Encode a plan event."""
    return control.WatchPlansResponse(
        generation=event.generation,
        plans=[plan_to_proto(plan) for plan in event.plans],
        sealed_through=event.sealed_through,
        reset=event.reset,
        epoch=event.epoch,
        asked=event.asked,
    )


@checked
def plan_event_from_proto(message: control.WatchPlansResponse) -> PlanEvent:
    """Decode a plan event."""
    return PlanEvent(
        generation=Generation(message.generation),
        plans=tuple(plan_from_proto(plan) for plan in message.plans),
        sealed_through=message.sealed_through,
        reset=message.reset,
        epoch=message.epoch,
        asked=message.asked,
    )


def join_request_to_proto(request: JoinRequest) -> control.JoinRequest:
    """Encode a rank's wish to take part."""
    message = control.JoinRequest(
        run_id=request.run_id,
        rank=request.rank,
        world_size=request.world_size,
        attempt_id=request.attempt_id,
        global_sequences=request.global_sequences,
        sequence_length=request.sequence_length,
        timeout_s=request.timeout_s,
    )
    if request.resume is not None:
        resume = control.Resume(
            order_sha256=request.resume.order_sha256,
            step=request.resume.step,
            cursors=cursors_to_proto(request.resume.cursors, request.resume.step),
        )
        message.resume.CopyFrom(resume)
    return message


@checked
def join_request_from_proto(message: control.JoinRequest) -> JoinRequest:
    """Decode a rank's wish to take part."""
    resume = None
    if message.HasField("resume"):
        cursors, steps = cursors_from_proto(message.resume.cursors)
        if any(step != message.resume.step for step in steps.values()):
            raise ValueError(f"a cursor of another step than {message.resume.step}: {steps}")
        resume = Resume(
            order_sha256=message.resume.order_sha256,
            step=Step(_bounded("resume.step", message.resume.step)),
            cursors=cursors,
        )
    if not message.attempt_id:
        raise ValueError("attempt_id must not be empty")
    return JoinRequest(
        run_id=message.run_id,
        rank=Rank(message.rank),
        world_size=message.world_size,
        attempt_id=message.attempt_id,
        global_sequences=message.global_sequences,
        sequence_length=message.sequence_length,
        timeout_s=_at_most("timeout_s", message.timeout_s, MAX_JOIN_S),
        resume=resume,
    )


def join_answer_to_proto(answer: JoinAnswer) -> control.JoinResponse:
    """Encode what a rank needs to start."""
    return control.JoinResponse(
        generation=answer.generation,
        spec=spec_to_proto(answer.spec),
        first_step=answer.first_step,
        endpoints=[endpoint_to_proto(endpoint) for endpoint in answer.endpoints],
        cursors=cursors_to_proto(answer.cursors, answer.cursor_steps),
        lanes_version=answer.lanes_version,
    )


@checked
def join_answer_from_proto(message: control.JoinResponse) -> JoinAnswer:
    """Decode what a rank needs to start."""
    cursors, steps = cursors_from_proto(message.cursors)
    return JoinAnswer(
        generation=Generation(message.generation),
        spec=spec_from_proto(message.spec),
        first_step=Step(message.first_step),
        endpoints=tuple(endpoint_from_proto(endpoint) for endpoint in message.endpoints),
        cursors=cursors,
        cursor_steps=steps,
        lanes_version=_bounded("lanes_version", message.lanes_version),
    )


def lane_table_to_proto(table: LaneTable) -> control.LocateResponse:
    """Encode who serves each lane."""
    return control.LocateResponse(
        endpoints=[endpoint_to_proto(endpoint) for endpoint in table.endpoints],
        lanes_version=table.version,
    )


@checked
def lane_table_from_proto(message: control.LocateResponse) -> LaneTable:
    """Decode who serves each lane."""
    return LaneTable(
        version=_bounded("lanes_version", message.lanes_version),
        endpoints=tuple(endpoint_from_proto(endpoint) for endpoint in message.endpoints),
    )


_OPTIONAL_FLOATS = ("validation_loss", "excess_sum", "part_square_norms")
_OPTIONAL = (*_OPTIONAL_FLOATS, "num_parts")
"""Of a report: [domains] each, or not measured."""


def report_to_proto(report: StepReport) -> control.ReportRequest:
    """Encode a report; its cursors stand before the next step."""
    part = report.alignment_part
    return control.ReportRequest(
        generation=report.generation,
        rank=report.rank,
        step=report.step,
        plan_version=report.plan_version,
        sequences=report.sequences.tolist(),
        tokens=report.tokens.tolist(),
        loss_sum=report.loss_sum.tolist(),
        alignment_part=b"" if part is None else np.ascontiguousarray(part, _FLOATS).tobytes(),
        alignment_share=report.alignment_share,
        weight_norms=report.weight_norms,
        update_norms=report.update_norms,
        **{name: array.tolist() for name, array in _given(report)},
        step_s=report.step_s,
        data_wait_s=report.data_wait_s,
        probe_s=report.probe_s,
        degraded=report.degraded,
        cursors=cursors_to_proto(report.cursors, Step(report.step + 1)),
    )


@checked
def report_from_proto(message: control.ReportRequest) -> StepReport:
    """Decode a report. Shapes against the run, and finiteness, are the controller's to check."""
    num_domains = len(message.sequences)
    part = None
    if message.alignment_part:
        part = array_from_bytes(message.alignment_part, _FLOATS, (num_domains, num_domains))
    cursors, _ = cursors_from_proto(message.cursors)
    return StepReport(
        generation=Generation(message.generation),
        rank=Rank(message.rank),
        step=Step(_bounded("step", message.step)),
        plan_version=message.plan_version,
        sequences=_whole("sequences", message.sequences),
        tokens=_whole("tokens", message.tokens),
        loss_sum=np.array(message.loss_sum, np.float64),
        alignment_part=part,
        alignment_share=message.alignment_share,
        weight_norms=tuple(message.weight_norms),
        update_norms=tuple(message.update_norms),
        num_parts=_whole("num_parts", message.num_parts) if message.num_parts else None,
        **{name: _floats_or_none(getattr(message, name)) for name in _OPTIONAL_FLOATS},
        step_s=message.step_s,
        data_wait_s=message.data_wait_s,
        probe_s=message.probe_s,
        degraded=message.degraded,
        cursors=cursors,
    )


def reports_to_proto(reports: Sequence[StepReport]) -> control.ReportStepsRequest:
    """Encode several reports of one rank."""
    return control.ReportStepsRequest(reports=[report_to_proto(report) for report in reports])


def report_answer_to_proto(answer: ReportAnswer) -> control.ReportResponse:
    """Encode the answer to a report."""
    return control.ReportResponse(
        plan_version=answer.plan_version,
        sealed_through=answer.sealed_through,
        counted=answer.counted,
        lanes_version=answer.lanes_version,
        epoch=answer.epoch,
        observed_through=answer.observed_through,
        ledger_head=answer.ledger_head,
    )


def report_answer_from_proto(message: control.ReportResponse) -> ReportAnswer:
    """Decode the answer to a report."""
    return ReportAnswer(
        plan_version=message.plan_version,
        sealed_through=message.sealed_through,
        counted=message.counted,
        lanes_version=message.lanes_version,
        epoch=message.epoch,
        observed_through=message.observed_through,
        ledger_head=message.ledger_head[:MAX_NAME],
    )


_BEAT_FIELDS = field_names(WorkerBeat, but={"quarantines", "alone"})


def worker_beat_to_proto(beat: WorkerBeat) -> control.EnlistRequest:
    """Encode what a worker says of itself."""
    return control.EnlistRequest(
        quarantines=[quarantine_to_proto(quarantine) for quarantine in beat.quarantines],
        alone=[
            control.AloneSteps(
                first_step=each.first_step,
                last_step=each.last_step,
                plan_version=each.plan_version,
                lanes=each.lanes,
            )
            for each in beat.alone
        ],
        **{name: getattr(beat, name) for name in _BEAT_FIELDS},
    )


@checked
def worker_beat_from_proto(message: control.EnlistRequest) -> WorkerBeat:
    """Decode what a worker says of itself."""
    if not message.worker_id or not message.endpoint:
        raise ValueError("worker_id and endpoint must not be empty")
    _finite("stall_s", message.stall_s)
    for name in ("generation", "degraded_steps", "cache_bytes", "sequences_served", "answered"):
        _bounded(name, getattr(message, name))
    for name in ("worker_id", "endpoint", "run_id"):
        if len(getattr(message, name)) > MAX_NAME:
            raise ValueError(f"{name} must have at most {MAX_NAME} characters")
    return WorkerBeat(
        quarantines=tuple(quarantine_from_proto(item) for item in message.quarantines),
        alone=tuple(_alone_from_proto(item) for item in message.alone),
        **{name: getattr(message, name) for name in _BEAT_FIELDS},
    )


def _alone_from_proto(message: control.AloneSteps) -> AloneSteps:
    return AloneSteps(
        first_step=Step(_bounded("first_step", message.first_step)),
        last_step=Step(_bounded("last_step", message.last_step)),
        plan_version=_bounded("plan_version", message.plan_version),
        lanes=tuple(Lane(lane) for lane in message.lanes),
    )


def enlist_event_to_proto(event: EnlistEvent) -> control.EnlistResponse:
    """Encode what a worker is told."""
    if isinstance(event, RunSpec):
        return control.EnlistResponse(spec=spec_to_proto(event))
    if isinstance(event, Beat):
        return control.EnlistResponse(beat=control.Beat(drain=event.drain))
    chunk = control.BlobChunk(
        name=event.name, offset=event.offset, total_bytes=event.total_bytes, data=event.data
    )
    return control.EnlistResponse(chunk=chunk)


@checked
def enlist_event_from_proto(message: control.EnlistResponse) -> EnlistEvent:
    """Decode what a worker is told."""
    kind = message.WhichOneof("event")
    if kind == "spec":
        return spec_from_proto(message.spec)
    if kind == "beat":
        return Beat(drain=message.beat.drain)
    if kind == "chunk":
        return BlobChunk(
            name=message.chunk.name,
            offset=message.chunk.offset,
            total_bytes=message.chunk.total_bytes,
            data=message.chunk.data,
        )
    raise ValueError("an empty event")


def _given(report: StepReport) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in _OPTIONAL:
        array = getattr(report, name)
        if array is not None:
            yield name, array


def _floats_or_none(values: Sequence[float]) -> NDArray[np.float64] | None:
    return np.array(values, np.float64) if values else None


def _whole(name: str, values: Sequence[int]) -> NDArray[np.int64]:
    if values:
        _bounded(name, max(values))
    return np.array(values, np.int64)


def _bounded(name: str, value: int) -> int:
    if value > _MAX_INT64:
        raise ValueError(f"{name} must fit 63 bits, got {value}")
    return value


def _at_most(name: str, value: float, most: float) -> float:
    if _finite(name, value) > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value:g}")
    return value


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value
