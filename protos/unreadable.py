"""Messages that are none: bytes that do not parse are the caller's fault, not the server's.

gRPC answers them with INTERNAL or UNKNOWN, as it does what is broken here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from protos.errors import InvalidMessage

_SENTENCE = "the bytes are no message of this call: both ends must be of one version of Headrace"


class Unreadable:
    """Stands where a stream's message could not be read; whoever asks for a field refuses it."""

    def __getattr__(self, name: str) -> NoReturn:
        raise InvalidMessage(_SENTENCE)


_UNREADABLE = Unreadable()


def refusing_unreadable(handler: Any, *, is_async: bool) -> Any:
    """Return a handler (a grpc.RpcMethodHandler, or None) that answers INVALID_ARGUMENT instead."""
    if handler is None or handler.request_deserializer is None:
        return handler
    changes: dict[str, Any] = {"request_deserializer": _reading(handler.request_deserializer)}
    if not handler.request_streaming:
        name = "unary_stream" if handler.response_streaming else "unary_unary"
        inner = getattr(handler, name)
        changes[name] = _async_checked(inner) if is_async else _checked(inner)
    return handler._replace(**changes)


def _reading(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _UNREADABLE

    return read


def _checked(inner: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        if request is _UNREADABLE:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, _SENTENCE)
        return inner(request, context)

    return answer


def _async_checked(inner: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def answer(request: Any, context: Any) -> Any:
        if request is _UNREADABLE:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _SENTENCE)
        return await inner(request, context)

    return answer
