"""Calls to controller and loader workers in our own types, on gRPC's synchronous stack."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import numpy as np

from protos import codec, codec_admin, codec_data
from protos.channel import (
    CLIENT_OPTIONS,
    MAX_BATCH_BYTES,
    MAX_CONTROL_BYTES,
    LazyChannel,
    raising_ours,
    size_options,
)
from protos.errors import ControllerUnreachable, HeadraceError, Retryable, WorkerUnreachable
from protos.security import Security, split_address
from protos.status import RunStatus
from protos.types import (
    Credit,
    EnlistEvent,
    Generation,
    JoinAnswer,
    JoinRequest,
    LaneTable,
    OpenStream,
    PlanEvent,
    ReportAnswer,
    StepBatch,
    StepReport,
    WorkerBeat,
)
from protos.wire import admin_pb2, admin_pb2_grpc, control_pb2, control_pb2_grpc, data_pb2_grpc

M = TypeVar("M")
T = TypeVar("T")

_JOIN_SLACK_S = 5.0
"""How much longer than the barrier itself a Join may take to be answered."""


class Stream(Iterator[T], Generic[T]):
    """What a streaming call brings, decoded; `cancel` from any thread ends it."""

    def __init__(
        self,
        call: Any,  # a multi-threaded rendezvous: a grpc.Call that iterates over messages
        decode: Callable[[M], T],
        unreachable: type[Retryable],
        peer: str,
    ) -> None:
        self._call = call
        self._decode: Callable[[Any], T] = decode
        self._unreachable = unreachable
        self._peer = peer
        self._cancelled = False

    def __next__(self) -> T:
        try:
            with raising_ours(self._unreachable, self._peer):
                message = next(self._call)
        except HeadraceError:
            if self._cancelled:
                raise StopIteration from None
            raise
        return self._decode(message)

    def cancel(self) -> None:
        """End the stream; a thread that waits for its next item gets StopIteration."""
        self._cancelled = True
        self._call.cancel()


class _Client:
    def __init__(
        self,
        address: str,
        *,
        max_bytes: int,
        unreachable: type[Retryable],
        security: Security | None,
        token_path: Path | None,
    ) -> None:
        split_address(address)
        self.address = address
        self._unreachable = unreachable
        self._channel = LazyChannel(
            address,
            [*CLIENT_OPTIONS, *size_options(max_bytes)],
            security=security,
            token_path=token_path,
        )

    def _open(self) -> grpc.Channel:
        return self._channel.get(os.getpid())

    def _stream(self, call: Any, decode: Callable[[M], T]) -> Stream[T]:
        return Stream(call, decode, self._unreachable, self.address)

    def close(self) -> None:
        """Close the connection; calls under way end. Closing twice does no harm."""
        self._channel.close(os.getpid())


class ControlClient(_Client):
    """The controller, for ranks and loader workers.

    Every method raises the error classes that `protos.services.ControlService` names, and
    ControllerUnreachable when no answer comes in time.
    """

    def __init__(self, address: str, *, security: Security | None = None) -> None:
        super().__init__(
            address,
            max_bytes=MAX_CONTROL_BYTES,
            unreachable=ControllerUnreachable,
            security=security,
            token_path=security.join_token_file if security is not None else None,
        )

    def _stub(self) -> control_pb2_grpc.ControlStub:
        return control_pb2_grpc.ControlStub(self._open())

    def join(self, request: JoinRequest) -> JoinAnswer:
        """Wait until all ranks are there; see `ControlService.join`."""
        with raising_ours(self._unreachable, self.address):
            message = self._stub().Join(
                codec.join_request_to_proto(request), timeout=request.timeout_s + _JOIN_SLACK_S
            )
        return codec.join_answer_from_proto(message)

    def locate(
        self, generation: Generation, *, unreachable: str = "", timeout_s: float = 5.0
    ) -> LaneTable:
        """Ask who serves each lane now; see `ControlService.locate`."""
        request = control_pb2.LocateRequest(generation=generation, unreachable=unreachable)
        with raising_ours(self._unreachable, self.address):
            message = self._stub().Locate(request, timeout=timeout_s)
        return codec.lane_table_from_proto(message)

    def report(self, report: StepReport, *, timeout_s: float = 5.0) -> ReportAnswer:
        """Say what this rank saw of a step; may be repeated."""
        with raising_ours(self._unreachable, self.address):
            message = self._stub().Report(codec.report_to_proto(report), timeout=timeout_s)
        return codec.report_answer_from_proto(message)

    def report_steps(
        self, reports: Sequence[StepReport], *, timeout_s: float = 5.0
    ) -> ReportAnswer:
        """Say what this rank saw of several steps, in their order; may be repeated.

        The answer is the one to the last of them; `counted` says whether all were.
        """
        with raising_ours(self._unreachable, self.address):
            message = self._stub().ReportSteps(codec.reports_to_proto(reports), timeout=timeout_s)
        return codec.report_answer_from_proto(message)

    def watch_plans(self, worker_id: str, *, answers: bool = False) -> Stream[PlanEvent]:
        """Hear of plans and seals until cancelled; who `answers` is asked first."""
        request = control_pb2.WatchPlansRequest(worker_id=worker_id, answers=answers)
        call = self._stub().WatchPlans(request)
        return self._stream(call, codec.plan_event_from_proto)

    def enlist(self, beats: Iterator[WorkerBeat]) -> Stream[EnlistEvent]:
        """Take part as a worker for as long as `beats` goes on; it runs on a thread of gRPC's."""
        call = self._stub().Enlist(codec.worker_beat_to_proto(beat) for beat in beats)
        return self._stream(call, codec.enlist_event_from_proto)


class AdminClient(_Client):
    """The controller, for operators. Every call takes `timeout_s` and may be repeated."""

    def __init__(self, address: str, *, security: Security | None = None) -> None:
        super().__init__(
            address,
            max_bytes=MAX_CONTROL_BYTES,
            unreachable=ControllerUnreachable,
            security=security,
            token_path=security.admin_token_file if security is not None else None,
        )

    def _stub(self) -> admin_pb2_grpc.AdminStub:
        return admin_pb2_grpc.AdminStub(self._open())

    def status(self, *, timeout_s: float = 5.0) -> RunStatus:
        """Ask how the run stands."""
        with raising_ours(self._unreachable, self.address):
            message = self._stub().Status(admin_pb2.StatusRequest(), timeout=timeout_s)
        return codec_admin.status_from_proto(message)

    def set_mixture(self, shares: Mapping[str, float], *, timeout_s: float = 5.0) -> int:
        """Override the policy; return the first step that obeys."""
        request = admin_pb2.SetMixtureRequest(shares=shares)
        with raising_ours(self._unreachable, self.address):
            return self._stub().SetMixture(request, timeout=timeout_s).first_step

    def freeze(self, *, timeout_s: float = 5.0) -> None:
        """Hold the mixture in force."""
        with raising_ours(self._unreachable, self.address):
            self._stub().Freeze(admin_pb2.FreezeRequest(), timeout=timeout_s)

    def resume(self, *, timeout_s: float = 5.0) -> None:
        """Give the decision back to the policy."""
        with raising_ours(self._unreachable, self.address):
            self._stub().Resume(admin_pb2.ResumeRequest(), timeout=timeout_s)

    def snapshot_policy(self, *, timeout_s: float = 60.0) -> str:
        """Save the policy's state; return its path on the controller's machine."""
        with raising_ours(self._unreachable, self.address):
            request = admin_pb2.SnapshotPolicyRequest()
            return self._stub().SnapshotPolicy(request, timeout=timeout_s).path

    def drain(self, *, timeout_s: float = 60.0) -> None:
        """End the run's decisions."""
        with raising_ours(self._unreachable, self.address):
            self._stub().Drain(admin_pb2.DrainRequest(), timeout=timeout_s)

    def scale(self, workers: int, *, timeout_s: float = 5.0) -> None:
        """Want so many loader workers."""
        with raising_ours(self._unreachable, self.address):
            self._stub().Scale(admin_pb2.ScaleRequest(workers=workers), timeout=timeout_s)


class DataClient(_Client):
    """One loader worker, for a rank."""

    def __init__(self, endpoint: str, *, security: Security | None = None) -> None:
        super().__init__(
            endpoint,
            max_bytes=MAX_BATCH_BYTES,
            unreachable=WorkerUnreachable,
            security=security,
            token_path=security.join_token_file if security is not None else None,
        )

    def stream_batches(
        self,
        opening: OpenStream,
        credits: Iterator[Credit],
        *,
        token_dtype: np.dtype[Any],
        sequence_length: int,
    ) -> Stream[StepBatch]:
        """Open the stream of some lanes' batches; `credits` runs on a thread of gRPC's."""

        def requests() -> Iterator[Any]:
            yield codec_data.open_stream_to_proto(opening)
            for credit in credits:
                yield codec_data.credit_to_proto(credit)

        def decode(message: Any) -> StepBatch:
            return codec_data.step_batch_from_proto(
                message, token_dtype=token_dtype, sequence_length=sequence_length
            )

        call = data_pb2_grpc.DataStub(self._open()).StreamBatches(requests())
        return self._stream(call, decode)


def healthy(
    address: str, *, timeout_s: float, security: Security | None = None, service: str = ""
) -> bool:
    """Ask the standard health service of a controller or worker whether it, or a service, serves.

    Either token opens it, where it asks for one.
    """
    from grpc_health.v1 import health_pb2  # not among what a trainer installs

    token_path = None
    if security is not None:
        token_path = security.join_token_file or security.admin_token_file
    lazy = LazyChannel(address, CLIENT_OPTIONS, security=security, token_path=token_path)
    try:
        check = lazy.get(os.getpid()).unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        request = health_pb2.HealthCheckRequest(service=service)
        answer = check(request, timeout=timeout_s, wait_for_ready=True)
    except grpc.RpcError:
        return False
    finally:
        lazy.close(os.getpid())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
