"""How much a server takes from the network, of everything that a caller can send much of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a server takes at once. Beyond it callers are refused or wait; what runs goes on."""

    connections: int
    """A rank has one, a loader worker one; those beyond are closed at once."""

    calls: int
    """On all connections together; those beyond get RESOURCE_EXHAUSTED."""

    request_bytes: int = 16 << 20
    """Of one message; a larger one gets RESOURCE_EXHAUSTED."""

    answer_bytes: int = 16 << 20
    streams_a_connection: int = 128
    """Calls on one connection; those beyond wait at the caller's end."""

    metadata_bytes: int = 16 << 10
    """Of one call's headers; more gets RESOURCE_EXHAUSTED."""

    call_s: float = 120.0
    """For a unary call, whatever deadline its caller set or did not; a Join has one of its own."""

    handshake_s: float = 10.0
    """For TLS and HTTP/2 to begin; a connection that takes longer is closed."""

    def options(self) -> list[tuple[str, Any]]:
        """Return them as gRPC takes them; the others are not options."""
        return [
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.max_concurrent_streams", self.streams_a_connection),
            ("grpc.max_receive_message_length", self.request_bytes),
            ("grpc.max_send_message_length", self.answer_bytes),
            ("grpc.max_metadata_size", self.metadata_bytes),
            # Between the two, calls would be refused at random.
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_s * 1000)),
        ]


CONTROLLER = Limits(connections=16_384, calls=16_384)


def worker_limits(max_streams: int, answer_bytes: int) -> Limits:
    """Return those of a loader worker that serves so many ranks; each stream holds a thread."""
    return Limits(connections=4 * max_streams, calls=max_streams + 4, answer_bytes=answer_bytes)
