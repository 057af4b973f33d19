"""The HTTP endpoint for Prometheus: `/metrics`, and nothing else.

    who              does                        waits for                    woken by
    server thread    takes connections           the socket                   a caller, close
    a call's thread  handshake, token, answer    the caller, `CALL_S` at most  it
                     asks for the figures        the event loop, `CALL_S`      it

Nothing here can hold up a decision: the loop answers between two of its own turns.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client.exposition import choose_encoder

from protos.errors import AlreadyServing, ConfigError
from protos.security import Security, split_address
from protos.tokens import TokenFile, token_file

logger = logging.getLogger(__name__)

PATH = "/metrics"
CALL_S = 5.0
"""How long a call may take in all of its waits."""

MOST_CALLS = 8
"""At a time; more are turned away."""

_LOOK_EVERY_S = 0.1
"""How soon the server's thread hears that it shall end."""

Read = Callable[[], list[Any]]
"""Returns the figures, as prometheus_client takes them; raises TimeoutError."""


class _Figures:
    """A registry for the encoders: what was read at one moment."""

    def __init__(self, read: list[Any]) -> None:
        self._read = read

    def collect(self) -> Iterator[Any]:
        yield from self._read


class _Handler(BaseHTTPRequestHandler):
    timeout = CALL_S
    server: _Server
    server_version = "headrace"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is only {PATH} here")
            return
        token = self.server.token
        if token is not None and not token.takes(self.headers.get("Authorization") or ""):
            self._refuse(HTTPStatus.UNAUTHORIZED, "show the token: Authorization: Bearer TOKEN")
            return
        try:
            figures = self.server.read()
        except TimeoutError:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the controller is busy; ask again")
            return
        encode, content_type = choose_encoder(self.headers.get("Accept") or "")
        self._answer(HTTPStatus.OK, encode(_Figures(figures)), content_type)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._answer(status, (sentence + "\n").encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single calls: they come every few seconds, for weeks."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(
        self, address: str, security: Security, token: TokenFile | None, read: Read
    ) -> None:
        host, port = split_address(address)
        self.read = read
        self.token = token
        self._tls = _Tls(security) if security.serves_tls else None
        self._free = threading.BoundedSemaphore(MOST_CALLS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host.strip("[]"), port), _Handler)
        except OSError as error:
            raise AlreadyServing(
                f"cannot serve metrics at {address}: {error.strerror}; stop the process that holds "
                "the port or choose another metrics.address"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(CALL_S)
            if self._tls is not None:
                # Here rather than where connections are taken: a caller that says nothing in the
                # handshake keeps no other one waiting.
                request = self._tls.context().wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError as error:
            logger.debug("metrics call of %s: %s", client_address, error)
            self.shutdown_request(request)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("metrics call of %s broke off", client_address)


class _Tls:
    """The server's side of TLS, from files that are read again for each call."""

    def __init__(self, security: Security) -> None:
        self._security = security
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return what the files hold now, or held when they last belonged together."""
        with contextlib.suppress(ConfigError):
            self._context = self._load()
        return self._context

    def _load(self) -> ssl.SSLContext:
        security = self._security
        assert security.cert is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(security.cert, security.key, password="")
            if security.client_ca is not None:
                context.load_verify_locations(security.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot use {security.cert} for metrics: {error}") from None
        return context


@contextmanager
def serving_metrics(
    address: str, security: Security, token: Path | None, read: Read
) -> Iterator[str]:
    """Serve the figures for as long as the block lasts; give the URL.

    Raises:
        AlreadyServing: the port is taken.
        ConfigError: a certificate or the token file cannot be used.
    """
    server = _Server(address, security, token_file(token) if token else None, read)
    host, _ = split_address(address)
    thread = threading.Thread(
        target=server.serve_forever, args=(_LOOK_EVERY_S,), name="headrace-metrics", daemon=True
    )
    thread.start()
    scheme = "https" if security.serves_tls else "http"
    try:
        yield f"{scheme}://{host}:{server.server_address[1]}{PATH}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(CALL_S)
