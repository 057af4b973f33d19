"""What a caller can send too much of, sent by real callers to servers that go on serving."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.client import AdminClient, ControlClient
from protos.errors import InvalidMessage, NotReady
from protos.limits import CONTROLLER, worker_limits
from protos.server import serving_data
from protos.types import Rank
from tests.fakes_controller import join_request
from tests.fakes_security import call
from tests.fakes_served import Served, served
from tests.fakes_services import ScriptedController, ScriptedWorker, serving
from tests.fakes_trainer import wait_until

STATUS = "/headrace.v1.Admin/Status"
WATCH = "/headrace.v1.Control/WatchPlans"
STREAM = "/headrace.v1.Data/StreamBatches"
TOO_MUCH = grpc.StatusCode.RESOURCE_EXHAUSTED
OWN = [("grpc.use_local_subchannel_pool", 1)]
"""Else channels of one process share a connection."""


@contextmanager
def channel(address: str, *more: tuple[str, Any]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address, options=[*OWN, *more]) as opened:
        yield opened


def watch(opened: grpc.Channel) -> Any:
    """Open a stream that stays, and see it answered."""
    method: Any = opened.stream_stream(WATCH)
    stream = method(iter([b""]), timeout=30)
    next(stream)
    return stream


def test_connections_beyond_the_limit_are_closed_and_room_is_made_by_those_that_leave() -> None:
    limits = dataclasses.replace(CONTROLLER, connections=3)
    with serving(ScriptedController(), limits=limits) as address, ExitStack() as stack:
        inside = [stack.enter_context(channel(address)) for _ in range(3)]
        for opened in inside:
            assert call(opened, STATUS)[0] is grpc.StatusCode.OK
        with channel(address) as fourth:
            assert call(fourth, STATUS)[0] is grpc.StatusCode.UNAVAILABLE
        assert call(inside[0], STATUS)[0] is grpc.StatusCode.OK
        inside[2].close()

        def is_let_in() -> bool:
            with channel(address) as another:
                return call(another, STATUS)[0] is grpc.StatusCode.OK

        wait_until(is_let_in)


def test_streams_beyond_the_limit_of_a_connection_wait_and_other_connections_do_not() -> None:
    limits = dataclasses.replace(CONTROLLER, streams_a_connection=4)
    with serving(ScriptedController(), limits=limits) as address, channel(address) as opened:
        streams = [watch(opened) for _ in range(4)]
        waits, _ = call(opened, STATUS, timeout_s=0.5)
        assert waits is grpc.StatusCode.DEADLINE_EXCEEDED
        with channel(address) as other:
            assert call(other, STATUS)[0] is grpc.StatusCode.OK
        streams[0].cancel()
        assert call(opened, STATUS)[0] is grpc.StatusCode.OK


def test_calls_beyond_the_limit_are_refused_and_may_be_made_again() -> None:
    limits = dataclasses.replace(CONTROLLER, calls=4)
    with serving(ScriptedController(), limits=limits) as address, channel(address) as opened:
        streams = [watch(opened) for _ in range(4)]
        assert call(opened, STATUS)[0] is TOO_MUCH
        client = AdminClient(address)
        with pytest.raises(NotReady):
            client.status()
        streams[0].cancel()
        wait_until(lambda: call(opened, STATUS)[0] is grpc.StatusCode.OK)
        client.close()


@pytest.mark.parametrize("path", [STATUS, STREAM])
def test_messages_and_headers_beyond_the_limit_are_refused(path: str) -> None:
    big = ("grpc.max_send_message_length", -1)
    headers = ("grpc.max_metadata_size", 1 << 20)
    with (
        serving(ScriptedController()) as controller,
        serving_data(ScriptedWorker(), address="127.0.0.1:0") as worker,
        channel(worker if path == STREAM else controller, big, headers) as opened,
    ):
        most = CONTROLLER.request_bytes
        assert call(opened, path, (), bytes(most + 1), timeout_s=20)[0] is TOO_MUCH
        metadata = [("x-much", "x" * CONTROLLER.metadata_bytes)]
        assert call(opened, path, metadata)[0] is TOO_MUCH
        metadata = [("x-less", "x" * (CONTROLLER.metadata_bytes // 2))]
        assert call(opened, path, metadata)[0] is not TOO_MUCH


def test_a_call_without_a_deadline_ends_by_the_servers() -> None:
    class Stuck(ScriptedController):
        async def freeze(self) -> None:
            await asyncio.Event().wait()

    limits = dataclasses.replace(CONTROLLER, call_s=0.3)
    with serving(Stuck(), limits=limits) as address, channel(address) as opened:
        freeze: Any = opened.unary_unary("/headrace.v1.Admin/Freeze")
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as raised:
            freeze(b"")
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "took more than 0.3 s" in str(raised.value.details())
        assert time.monotonic() - began < 10


def test_a_connection_that_says_nothing_is_closed() -> None:
    limits = dataclasses.replace(CONTROLLER, handshake_s=0.3)
    with serving(ScriptedController(), limits=limits) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            while silent.recv(1 << 10):
                pass  # the server's own preface; then the end


def test_a_worker_serves_so_many_ranks_and_refuses_the_next() -> None:
    with serving_data(ScriptedWorker(), address="127.0.0.1:0", max_streams=2) as worker:
        spare = worker_limits(2, answer_bytes=1 << 20).calls
        with channel(worker) as opened:
            stream: Any = opened.stream_stream(STREAM)
            hold = threading.Event()

            def requests() -> Iterator[bytes]:
                hold.wait(30)
                yield b""

            held = [stream(requests(), timeout=30) for _ in range(spare)]
            wait_until(lambda: call(opened, STREAM)[0] is TOO_MUCH)
            hold.set()
            for each in held:
                each.cancel()
            wait_until(lambda: call(opened, STREAM)[0] is not TOO_MUCH)


def test_a_flood_of_joins_leaves_nothing_behind_and_ends_as_asked(tmp_path: Path) -> None:
    """300 processes say that they are rank 0 of 2, one after the other; rank 1 never comes."""
    with served(tmp_path) as run:
        before = run.digest()
        clients = [ControlClient(run.address) for _ in range(4)]
        errors: list[BaseException] = []

        def flood(number: int) -> None:
            for attempt in range(75):
                request = join_request(0, 2, attempt=f"{number}-{attempt}", timeout_s=0.02)
                try:
                    clients[number].join(request)
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=flood, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(errors) == 300
        assert {type(error).__name__ for error in errors} <= {"JoinTimeout", "NotReady"}
        assert _num_waiting(run) == 0
        assert run.digest() == before
        answer = run.do(run.bench.join_all(1))
        assert answer.generation == 1
        for client in clients:
            client.close()


def _num_waiting(run: Served) -> int:
    gathering = run.bench.service._joining._barrier.gathering
    return len(gathering.on_end) + len(gathering.requests)


def test_a_join_that_would_wait_for_days_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as run:
        client = ControlClient(run.address)
        with pytest.raises(InvalidMessage, match="timeout_s must be at most 86400"):
            client.join(dataclasses.replace(join_request(0, 1), rank=Rank(0), timeout_s=1e6))
        client.close()
