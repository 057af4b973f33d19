"""gRPC settings that both ends share, and the translation of errors across the wire."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import grpc

import protos.errors as errors
from protos.errors import HeadraceError, InvalidMessage, NotReady, Rejected, Retryable

ERROR_KEY = "headrace-error"
"""Trailing metadata that names the class of an error."""

MAX_CONTROL_BYTES = 16 << 20
MAX_BATCH_BYTES = 256 << 20
"""One stream's sequences of one step."""

CLIENT_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Calls wait for the caller's own retry rule, not for gRPC's back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
]

SERVER_OPTIONS: list[tuple[str, Any]] = [
    # Else a second server binds the same port without an error, and both answer.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_metadata_size", 16 << 10),
]

_CLASS_OF_STATUS: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidMessage,
    grpc.StatusCode.OUT_OF_RANGE: InvalidMessage,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NotReady,
    grpc.StatusCode.ABORTED: NotReady,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessRefused,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessRefused,
}


def size_options(max_bytes: int) -> list[tuple[str, Any]]:
    """Bound messages in both directions."""
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
    ]


def status_of(error: HeadraceError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return status, sentence and trailing metadata for an error."""
    name = next(base for base in type(error).__mro__ if base in errors.STATUS_OF)
    return grpc.StatusCode[errors.STATUS_OF[name]], str(error), ((ERROR_KEY, name.__name__),)


def error_of(error: grpc.RpcError, unreachable: type[Retryable], peer: str) -> HeadraceError:
    """Return our error for a failed call.

    Args:
        error: what gRPC raised.
        unreachable: the class for a peer that does not answer.
        peer: its address, for the sentence.
    """
    call = cast(grpc.Call, error)  # every RpcError that a call raises is one
    code, details = call.code(), call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_KEY:
            named = getattr(errors, str(value), None)
            if isinstance(named, type) and issubclass(named, HeadraceError):
                return named(details)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return unreachable(f"no answer from {peer}: {details}")
    if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return unreachable(f"{peer} broke off the call ({code.name}): {details}")
    return _CLASS_OF_STATUS.get(code, Rejected)(f"{peer} refused ({code.name}): {details}")


@contextlib.contextmanager
def raising_ours(unreachable: type[Retryable], peer: str) -> Iterator[None]:
    """Turn gRPC's errors into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error, unreachable, peer) from None


class LazyChannel:
    """A channel that is opened when first used, once in each process.

    A channel does not survive a fork; a child that finds its parent's opens its own.
    """

    def __init__(self, address: str, options: list[tuple[str, Any]]) -> None:
        self._address = address
        self._options = options
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._pid = -1

    def get(self, pid: int) -> grpc.Channel:
        """Return this process's channel."""
        with self._lock:
            if self._channel is None or self._pid != pid:
                self._channel = grpc.insecure_channel(self._address, options=self._options)
                self._pid = pid
            return self._channel

    def close(self, pid: int) -> None:
        """Close it, if this process opened it; closing twice does no harm."""
        with self._lock:
            if self._channel is not None and self._pid == pid:
                self._channel.close()
            self._channel = None
