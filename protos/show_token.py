"""A client's token, shown with every call that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from protos.tokens import HEADER, TokenFile, bearer

Continue = Callable[[grpc.ClientCallDetails, Any], Any]


class _Details(grpc.ClientCallDetails):
    """A call's details with a token; gRPC's own named tuple has a `repr` that would show it."""

    def __init__(self, details: grpc.ClientCallDetails, token: str) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = (*(details.metadata or ()), (HEADER, bearer(token)))
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class ShowToken(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token that its file holds at the time of the call."""

    def __init__(self, file: TokenFile) -> None:
        self._file = file

    def _with(self, details: grpc.ClientCallDetails) -> _Details:
        return _Details(details, self._file.shown)

    def intercept_unary_unary(
        self, continuation: Continue, client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.UnaryUnaryClientInterceptor`."""
        return continuation(self._with(client_call_details), request)

    def intercept_unary_stream(
        self, continuation: Continue, client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.UnaryStreamClientInterceptor`."""
        return continuation(self._with(client_call_details), request)

    def intercept_stream_unary(
        self,
        continuation: Continue,
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        """See `grpc.StreamUnaryClientInterceptor`."""
        return continuation(self._with(client_call_details), request_iterator)

    def intercept_stream_stream(
        self,
        continuation: Continue,
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        """See `grpc.StreamStreamClientInterceptor`."""
        return continuation(self._with(client_call_details), request_iterator)
