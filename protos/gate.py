"""What stands before every call of both servers: no handler runs for a call that is not let in."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from protos.channel import status_of
from protos.errors import Rejected
from protos.tokens import Gatekeeper
from protos.unreadable import refusing_unreadable

logger = logging.getLogger(__name__)

_WARNINGS_APART_S = 10.0

Handler = Any  # a grpc.RpcMethodHandler, of requests and answers of any kind


class _Log:
    """Tells of refused calls, though not of each: whoever knocks must not fill the disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told_at = -_WARNINGS_APART_S
        self._num_untold = 0

    def refused(self, method: str, peer: str, refusal: Rejected) -> None:
        with self._lock:
            self._num_untold += 1
            now = time.monotonic()
            if now - self._told_at < _WARNINGS_APART_S:
                return
            num_calls, self._num_untold, self._told_at = self._num_untold, 0, now
        logger.warning(
            "refused %r of %s (%d such since the last warning): %s",
            method[:100],
            peer,
            num_calls,
            refusal,
        )


class AioGate(grpc.aio.ServerInterceptor):
    """For the controller's server."""

    def __init__(self, keeper: Gatekeeper) -> None:
        self._keeper = keeper
        self._log = _Log()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Let the call in, or have it end before its first message is read."""
        method = handler_call_details.method
        refusal = self._keeper.refusal(method, handler_call_details.invocation_metadata or ())
        if refusal is None:
            handler = await continuation(handler_call_details)
            return refusing_unreadable(handler, is_async=True)

        async def refuse(requests: Any, context: Any) -> None:
            self._log.refused(method, context.peer(), refusal)
            await context.abort(*status_of(refusal))

        # A stream, whatever was called: it needs no message to begin, so none is waited for.
        return grpc.stream_stream_rpc_method_handler(refuse)


class Gate(grpc.ServerInterceptor):
    """For a loader worker's server."""

    def __init__(self, keeper: Gatekeeper) -> None:
        self._keeper = keeper
        self._log = _Log()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Let the call in, or have it end before its first message is read."""
        method = handler_call_details.method
        refusal = self._keeper.refusal(method, handler_call_details.invocation_metadata or ())
        if refusal is None:
            return refusing_unreadable(continuation(handler_call_details), is_async=False)

        def refuse(requests: Any, context: Any) -> None:
            self._log.refused(method, context.peer(), refusal)
            code, sentence, trailing = status_of(refusal)
            context.set_trailing_metadata(trailing)
            context.abort(code, sentence)

        # A stream, whatever was called: it needs no message to begin, so none is waited for.
        return grpc.stream_stream_rpc_method_handler(refuse)
