"""An idle stream stays open for as long as it takes, and who pings without end is sent away.

Real gRPC on both ends with the product's own settings, every time a part of what it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from protos.channel import CLIENT_OPTIONS, SERVER_OPTIONS

SCALE = 20
"""So that ours ping every second: gRPC lets no client ping more often."""

METHOD = "/test.Idle/Watch"
Options = list[tuple[str, Any]]

NUM_IDLE = 10
"""Intervals between pings in which a stream carries nothing. The servers' pings stand for some of
them; by gRPC's own limit, of 5 minutes between pings, it would be broken by then."""


def faster(options: Sequence[tuple[str, Any]], times: int) -> Options:
    """Return the options with every time divided by `times`."""
    return [(name, value // times if name.endswith("_ms") else value) for name, value in options]


def milliseconds(options: Sequence[tuple[str, Any]], name: str) -> int:
    return int(dict(options)[name])


class _Idle(grpc.GenericRpcHandler):
    """A stream that says one thing and then nothing until it is told to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_stream_rpc_method_handler(self._watch)

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"first"
        self.go_on.wait(30)
        yield b"last"


@contextmanager
def _idle_stream(client_options: Options, server_options: Options) -> Iterator[tuple[Any, _Idle]]:
    handler = _Idle()
    server = grpc.server(ThreadPoolExecutor(2), options=server_options)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    own = ("grpc.use_local_subchannel_pool", 1)
    options = [*client_options, own]
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            method: Any = channel.unary_stream(METHOD)
            stream = method(b"", timeout=30)
            assert next(stream) == b"first"
            yield stream, handler
    finally:
        handler.go_on.set()
        server.stop(0).wait()


def _wait_idle(stream: Any, interval_s: float) -> None:
    """Let so much time pass that a client pings `NUM_IDLE` times, or until the stream breaks."""
    over = threading.Event()
    stream.add_callback(over.set)
    over.wait(NUM_IDLE * interval_s)


@pytest.mark.long
def test_a_stream_that_carries_nothing_for_long_stays_open() -> None:
    options = faster(CLIENT_OPTIONS, SCALE)
    with _idle_stream(options, faster(SERVER_OPTIONS, SCALE)) as (stream, handler):
        _wait_idle(stream, milliseconds(options, "grpc.keepalive_time_ms") / 1000)
        assert stream.is_active(), stream.details()
        handler.go_on.set()
        assert next(stream) == b"last"


def test_a_caller_that_pings_four_times_as_often_as_ours_is_sent_away() -> None:
    patient = [
        option
        for option in faster(SERVER_OPTIONS, SCALE // 4)
        # Pings of the server's own would stand for the caller's.
        if not option[0].startswith("grpc.keepalive_time")
    ]
    with _idle_stream(faster(CLIENT_OPTIONS, SCALE), patient) as (stream, _):
        with pytest.raises(grpc.RpcError) as told:
            next(stream)
        assert told.value.code() is grpc.StatusCode.UNAVAILABLE
        assert told.value.details() == "Too many pings"


def test_ours_ping_at_half_the_pace_that_is_allowed_at_most() -> None:
    allowed = milliseconds(SERVER_OPTIONS, "grpc.http2.min_ping_interval_without_data_ms")
    assert milliseconds(CLIENT_OPTIONS, "grpc.keepalive_time_ms") >= 2 * allowed
