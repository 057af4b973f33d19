"""gRPC settings that both ends share, and the translation of errors across the wire."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc

import protos.errors as errors
from protos.errors import ConfigError, HeadraceError, InvalidMessage, NotReady, Rejected, Retryable
from protos.security import Security, check_call
from protos.show_token import ShowToken
from protos.tls import ChannelFiles, ClientPems, channel_credentials
from protos.tokens import token_file

ERROR_KEY = "headrace-error"
"""Trailing metadata that names the class of an error."""

MAX_CONTROL_BYTES = 16 << 20
MAX_BATCH_BYTES = 256 << 20
"""One stream's sequences of one step."""

MAX_SENTENCE = 2_000
"""Characters of an error that cross the wire."""

CLIENT_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A stream whose rank computes for long carries nothing, and is still to be seen alive.
    ("grpc.http2.max_pings_without_data", 0),
    # Calls wait for the caller's own retry rule, not for gRPC's back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
]

SERVER_OPTIONS: list[tuple[str, Any]] = [
    # Else a second server binds the same port without an error, and both answer.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Half of what our clients keep to. Under a name that gRPC does not know it is 5 minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
]

_CLASS_OF_STATUS: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidMessage,
    grpc.StatusCode.OUT_OF_RANGE: InvalidMessage,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NotReady,
    grpc.StatusCode.ABORTED: NotReady,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessRefused,
    grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthenticated,
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
    sentence = str(error)
    if len(sentence) > MAX_SENTENCE:
        # It may hold what was sent, and travels in a header.
        sentence = f"{sentence[:MAX_SENTENCE]}..."
    return grpc.StatusCode[errors.STATUS_OF[name]], sentence, ((ERROR_KEY, name.__name__),)


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


_owner: int | None = None
"""The process that has used gRPC here; a fork finds its parent."""


def _claim(pid: int, address: str) -> None:
    """Take gRPC for this process; raises ConfigError in a fork of one that has used it."""
    global _owner
    if _owner is None:
        _owner = pid
    elif _owner != pid:
        raise ConfigError(
            f"process {pid} is a fork of process {_owner}, which had called Headrace already, and "
            f"gRPC does not survive a fork: {address} is not called. Start the process anew "
            "instead, e.g. DataLoader(..., multiprocessing_context='spawn')"
        )


class LazyChannel:
    """A channel that is opened when first used.

    gRPC's threads and locks do not survive a fork: a child of a process that has used it may hang
    in any call, even over a channel of its own, and is refused. When the files that a channel was
    made of change, calls that begin from then on go over a new one; streams that are open go on
    over the old one to their end.
    """

    def __init__(
        self,
        address: str,
        options: list[tuple[str, Any]],
        *,
        security: Security | None = None,
        token_path: Path | None = None,
    ) -> None:
        """Read the files; nothing is opened yet.

        Args:
            address: `host:port`.
            options: gRPC's.
            security: how the calls are guarded.
            token_path: the token that is shown with every call.

        Raises:
            ConfigError: a file cannot be used, or the token would travel in the clear.
        """
        security = security or Security()
        check_call(address, security, token_path)
        self._address = address
        self._options = list(options)
        if security.server_name:
            self._options.append(("grpc.ssl_target_name_override", security.server_name))
        self._files = ChannelFiles(security)
        self._token = token_file(token_path) if token_path is not None else None
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._retired: list[grpc.Channel] = []
        self._pems: ClientPems | None = None

    def get(self, pid: int) -> grpc.Channel:
        """Return this process's channel.

        Raises:
            ConfigError: the process is a fork of one that has used gRPC.
        """
        # Before the lock, which a thread of the parent may hold for ever in a fork.
        _claim(pid, self._address)
        with self._lock:
            pems = self._files.pems()
            if self._channel is not None and pems != self._pems:
                self._retired.append(self._channel)
                self._channel = None
            if self._channel is None:
                self._channel, self._pems = self._open(pems), pems
            return self._channel

    def _open(self, pems: ClientPems | None) -> grpc.Channel:
        if pems is None:
            channel = grpc.insecure_channel(self._address, options=self._options)
        else:
            channel = grpc.secure_channel(
                self._address, channel_credentials(pems), options=self._options
            )
        if self._token is None:
            return channel
        return grpc.intercept_channel(channel, ShowToken(self._token))

    def close(self, pid: int) -> None:
        """Close it, if this process opened it; closing twice does no harm."""
        if pid != _owner:
            return
        with self._lock:
            for channel in (*self._retired, self._channel):
                if channel is not None:
                    channel.close()
            self._channel, self._retired = None, []
