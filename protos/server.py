"""The services of `protos.services` on gRPC: what a handler raises becomes a status."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos import codec, codec_admin, codec_data
from protos.channel import (
    MAX_BATCH_BYTES,
    SERVER_OPTIONS,
    status_of,
)
from protos.errors import AlreadyServing, HeadraceError, InvalidMessage
from protos.gate import AioGate, Gate
from protos.limits import CONTROLLER, Limits, worker_limits
from protos.security import Security, check_bind, split_address
from protos.services import AdminService, ControlService, DataService
from protos.tls import server_credentials
from protos.tokens import Gatekeeper
from protos.types import Credit, Generation, WorkerBeat
from protos.wire import (
    admin_pb2,
    admin_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    data_pb2,
    data_pb2_grpc,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
DECISIONS = "headrace.v1.Decisions"
"""What to ask the controller's health service for, to learn whether it can decide: not while its
ledger cannot be written. Its other services go on serving then."""

_AioContext = grpc.aio.ServicerContext[Any, Any]


async def _abort(context: _AioContext, error: Exception) -> NoReturn:
    if isinstance(error, HeadraceError):
        await context.abort(*status_of(error))
    logger.error("a call failed unexpectedly", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the controller's log has more")
    raise AssertionError("abort always raises")


async def _answer(
    context: _AioContext, work: Callable[[], Awaitable[T]], *, call_s: float | None
) -> T:
    try:
        async with asyncio.timeout(call_s) as time_allowed:
            return await work()
    except Exception as error:
        if isinstance(error, TimeoutError) and time_allowed.expired():
            sentence = f"the call took more than {call_s:g} s and was ended"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        await _abort(context, error)


async def _stream(
    context: _AioContext, items: AsyncIterator[T], encode: Callable[[T], Any]
) -> None:
    """Send all items, and close what they come from however the call ends.

    As a generator it would be left as it is where the call ends while a message is being sent.
    """
    try:
        async for item in items:
            await context.write(encode(item))
    except Exception as error:
        await _abort(context, error)
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


class _Control(control_pb2_grpc.ControlServicer):
    def __init__(self, service: ControlService, limits: Limits) -> None:
        self._service = service
        self._call_s = limits.call_s

    async def Join(self, request: control_pb2.JoinRequest, context: _AioContext) -> Any:
        async def work() -> control_pb2.JoinResponse:
            answer = await self._service.join(codec.join_request_from_proto(request))
            return codec.join_answer_to_proto(answer)

        # It waits for other ranks, for as long as it says itself.
        return await _answer(context, work, call_s=None)

    async def Locate(self, request: control_pb2.LocateRequest, context: _AioContext) -> Any:
        async def work() -> control_pb2.LocateResponse:
            table = await self._service.locate(
                Generation(request.generation), unreachable=request.unreachable
            )
            return codec.lane_table_to_proto(table)

        return await _answer(context, work, call_s=self._call_s)

    async def Report(self, request: control_pb2.ReportRequest, context: _AioContext) -> Any:
        async def work() -> control_pb2.ReportResponse:
            answer = await self._service.report(codec.report_from_proto(request))
            return codec.report_answer_to_proto(answer)

        return await _answer(context, work, call_s=self._call_s)

    async def ReportSteps(
        self, request: control_pb2.ReportStepsRequest, context: _AioContext
    ) -> Any:
        async def work() -> control_pb2.ReportResponse:
            if not request.reports:
                raise InvalidMessage("a call to ReportSteps must hold at least one report")
            # Those before one that is refused stay taken in: each may be repeated on its own.
            answers = [
                await self._service.report(codec.report_from_proto(message))
                for message in request.reports
            ]
            counted = all(answer.counted for answer in answers)
            return codec.report_answer_to_proto(dataclasses.replace(answers[-1], counted=counted))

        return await _answer(context, work, call_s=self._call_s)

    async def WatchPlans(  # type: ignore[override]  # writes its answers rather than yields them
        self, request: control_pb2.WatchPlansRequest, context: _AioContext
    ) -> None:
        events = self._service.watch_plans(request.worker_id, answers=request.answers)
        await _stream(context, events, codec.plan_event_to_proto)

    async def Enlist(  # type: ignore[override]  # writes its answers rather than yields them
        self, request_iterator: AsyncIterator[control_pb2.EnlistRequest], context: _AioContext
    ) -> None:
        async def beats() -> AsyncIterator[WorkerBeat]:
            async for message in request_iterator:
                yield codec.worker_beat_from_proto(message)

        await _stream(context, self._service.enlist(beats()), codec.enlist_event_to_proto)


class _Admin(admin_pb2_grpc.AdminServicer):
    def __init__(self, service: AdminService, limits: Limits) -> None:
        self._service = service
        self._call_s = limits.call_s

    async def Status(self, request: admin_pb2.StatusRequest, context: _AioContext) -> Any:
        async def work() -> admin_pb2.StatusResponse:
            return codec_admin.status_to_proto(await self._service.status())

        return await _answer(context, work, call_s=self._call_s)

    async def SetMixture(self, request: admin_pb2.SetMixtureRequest, context: _AioContext) -> Any:
        async def work() -> admin_pb2.SetMixtureResponse:
            first_step = await self._service.set_mixture(dict(request.shares))
            return admin_pb2.SetMixtureResponse(first_step=first_step)

        return await _answer(context, work, call_s=self._call_s)

    async def Freeze(self, request: admin_pb2.FreezeRequest, context: _AioContext) -> Any:
        async def work() -> admin_pb2.FreezeResponse:
            await self._service.freeze()
            return admin_pb2.FreezeResponse()

        return await _answer(context, work, call_s=self._call_s)

    async def Resume(self, request: admin_pb2.ResumeRequest, context: _AioContext) -> Any:
        async def work() -> admin_pb2.ResumeResponse:
            await self._service.resume()
            return admin_pb2.ResumeResponse()

        return await _answer(context, work, call_s=self._call_s)

    async def SnapshotPolicy(
        self, request: admin_pb2.SnapshotPolicyRequest, context: _AioContext
    ) -> Any:
        async def work() -> admin_pb2.SnapshotPolicyResponse:
            return admin_pb2.SnapshotPolicyResponse(path=await self._service.snapshot_policy())

        return await _answer(context, work, call_s=self._call_s)

    async def Drain(self, request: admin_pb2.DrainRequest, context: _AioContext) -> Any:
        async def work() -> admin_pb2.DrainResponse:
            await self._service.drain()
            return admin_pb2.DrainResponse()

        return await _answer(context, work, call_s=self._call_s)

    async def Scale(self, request: admin_pb2.ScaleRequest, context: _AioContext) -> Any:
        async def work() -> admin_pb2.ScaleResponse:
            await self._service.scale(request.workers)
            return admin_pb2.ScaleResponse()

        return await _answer(context, work, call_s=self._call_s)


class _Data(data_pb2_grpc.DataServicer):
    def __init__(self, service: DataService) -> None:
        self._service = service

    def StreamBatches(
        self,
        request_iterator: Iterator[data_pb2.StreamBatchesRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[data_pb2.StreamBatchesResponse]:
        def credits() -> Iterator[Credit]:
            # When the rank goes away, gRPC ends its requests with an error of its own.
            with contextlib.suppress(grpc.RpcError):
                for message in request_iterator:
                    yield codec_data.credit_from_proto(message)

        try:
            opening = codec_data.open_stream_from_proto(next(request_iterator))
            for batch in self._service.stream_batches(opening, credits()):
                yield codec_data.step_batch_to_proto(batch)
        except (StopIteration, grpc.RpcError):
            return
        except HeadraceError as error:
            code, sentence, trailing = status_of(error)
            context.set_trailing_metadata(trailing)
            context.abort(code, sentence)
        except Exception:
            if not context.is_active():
                return
            logger.exception("a stream failed unexpectedly")
            context.abort(grpc.StatusCode.INTERNAL, "internal error; the worker's log has more")


def check_guard(address: str, security: Security) -> None:
    """Check all that a server of this address would be guarded by.

    Raises:
        ConfigError: the address may not be bound (see `protos.security.check_bind`), or a
            certificate or a token file cannot be used.
    """
    check_bind(address, security)
    Gatekeeper(security)
    server_credentials(security)


def _bind(server: grpc.Server | grpc.aio.Server, address: str, security: Security) -> int:
    credentials = server_credentials(security)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _taken(address, error) from None
    if port == 0:
        raise _taken(address, None)
    return port


def _taken(address: str, error: Exception | None) -> AlreadyServing:
    return AlreadyServing(
        f"cannot serve {address}: the port is in use or the address is not this machine's; "
        f"stop the process that holds it or choose another port{f' ({error})' if error else ''}"
    )


class _Health(health.aio.HealthServicer):
    """The standard health service, which also says whether decisions can be made."""

    def __init__(self, is_deciding: Callable[[], bool]) -> None:
        super().__init__()
        self._is_deciding = is_deciding

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: _AioContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service == DECISIONS:
            states = health_pb2.HealthCheckResponse
            return states(status=states.SERVING if self._is_deciding() else states.NOT_SERVING)
        answer: health_pb2.HealthCheckResponse = await super().Check(request, context)
        return answer


@contextlib.asynccontextmanager
async def serving_controller(
    control: ControlService,
    admin: AdminService,
    *,
    address: str,
    security: Security | None = None,
    limits: Limits = CONTROLLER,
    drain_s: float = 2.0,
    is_deciding: Callable[[], bool] = lambda: True,
) -> AsyncIterator[str]:
    """Serve the controller on the running event loop; yield the bound `host:port`.

    Args:
        control: what ranks and workers call.
        admin: what operators call.
        address: `host:port`; port 0 takes any free one.
        security: how the port is guarded.
        limits: how much it takes from the network.
        drain_s: how long calls under way may go on after the block ends.
        is_deciding: what the health service says of `DECISIONS`.

    Raises:
        AlreadyServing: the port is taken.
        ConfigError: see `check_guard`.
    """
    guard = security or Security()
    check_guard(address, guard)
    server = grpc.aio.server(
        interceptors=[AioGate(Gatekeeper(guard))],
        options=[*SERVER_OPTIONS, *limits.options()],
        maximum_concurrent_rpcs=limits.calls,
    )
    control_servicer, admin_servicer = _Control(control, limits), _Admin(admin, limits)
    control_pb2_grpc.add_ControlServicer_to_server(control_servicer, server)
    admin_pb2_grpc.add_AdminServicer_to_server(admin_servicer, server)
    checks = _Health(is_deciding)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = _bind(server, address, guard)
    await server.start()
    for name in ("", "headrace.v1.Control", "headrace.v1.Admin"):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield f"{split_address(address)[0]}:{port}"
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(drain_s)


@contextlib.contextmanager
def serving_data(
    service: DataService,
    *,
    address: str,
    max_streams: int = 64,
    security: Security | None = None,
    limits: Limits | None = None,
    drain_s: float = 2.0,
) -> Iterator[str]:
    """Serve a loader worker on threads; yield the bound `host:port`.

    Args:
        service: what ranks call.
        address: `host:port`; port 0 takes any free one.
        max_streams: how many ranks may stream at once; each holds a thread.
        security: how the port is guarded.
        limits: how much it takes from the network; by default what `max_streams` ranks need.
        drain_s: how long streams may go on after the block ends.

    Raises:
        AlreadyServing: the port is taken.
        ConfigError: see `check_guard`.
    """
    guard = security or Security()
    check_guard(address, guard)
    limits = limits or worker_limits(max_streams, MAX_BATCH_BYTES)
    threads = ThreadPoolExecutor(limits.calls, thread_name_prefix="headrace-data")
    server = grpc.server(
        threads,
        interceptors=[Gate(Gatekeeper(guard))],
        options=[*SERVER_OPTIONS, *limits.options()],
        maximum_concurrent_rpcs=limits.calls,
    )
    data_pb2_grpc.add_DataServicer_to_server(_Data(service), server)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = _bind(server, address, guard)
    server.start()
    for name in ("", "headrace.v1.Data"):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield f"{split_address(address)[0]}:{port}"
    finally:
        checks.enter_graceful_shutdown()
        server.stop(drain_s).wait()
        threads.shutdown(wait=False, cancel_futures=True)
