"""Serves the page on a thread of its own, beside the control loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator

import uvicorn

from controller.config import RunConfig
from controller.dashboard.access import Door
from controller.dashboard.ledger_tail import LedgerTail
from controller.dashboard.live import MAX_WATCHERS, Live
from controller.dashboard.operated import Operated, Reach
from controller.dashboard.routes import Page, application
from controller.dashboard.tls import server_context
from protos.errors import AlreadyServing, ConfigError
from protos.security import check_bind, split_address
from protos.spec import RunSpec
from protos.tokens import Gatekeeper

logger = logging.getLogger(__name__)

STOP_S = 5.0
MAX_CONNECTIONS = 4 * MAX_WATCHERS


class PageServer:
    """A page, from the moment its port is taken. `serve` once."""

    def __init__(self, config: RunConfig) -> None:
        """Take the port.

        Raises:
            AlreadyServing: somebody else has it.
            ConfigError: `config` has no page, or a certificate or token file cannot be used.
        """
        if config.dashboard is None:
            raise ConfigError("the run file has no section `dashboard`")
        self._config = config
        self._section = config.dashboard
        security = config.wire_security
        check_bind(self._section.address, security)
        self._keeper = Gatekeeper(security)
        self._tls = server_context(security)
        self._socket = _bound(self._section.address)
        self.url = self._section.url(security, self._socket.getsockname()[1])

    @contextlib.asynccontextmanager
    async def serving(self, controller: Operated, spec: RunSpec) -> AsyncIterator[None]:
        """Serve while the block lasts; called on the control loop."""
        reach = Reach(controller=controller, loop=asyncio.get_running_loop())
        tail = LedgerTail(self._config.ledger_path, spec.num_domains)
        live = Live(reach, tail)
        controller.on_written(live.written.ring)
        page = Page(
            spec=spec,
            live=live,
            ledger=self._config.ledger_path,
            guard=self._config.guard.model_dump(mode="json"),
        )
        host, _ = split_address(self._section.address)
        names = (*self._section.hosts, host, self._config.wire_security.server_name)
        server = self._server(Door(application(page), keeper=self._keeper, hosts=names))
        thread = threading.Thread(
            target=self._run, args=(server, live), name="headrace-page", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            # The page may wait for an answer of this loop, which goes on meanwhile.
            await asyncio.to_thread(thread.join, STOP_S)
            self.close()

    def close(self) -> None:
        """Give the port back; twice does no harm."""
        self._socket.close()

    def _server(self, door: Door) -> uvicorn.Server:
        settings = uvicorn.Config(
            door,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=16 << 10,
        )
        settings.load()
        settings.ssl = self._tls
        return uvicorn.Server(settings)

    def _run(self, server: uvicorn.Server, live: Live) -> None:
        try:
            asyncio.run(self._serve(server, live))
        except Exception:
            logger.exception("the page is served no more; the run goes on")

    async def _serve(self, server: uvicorn.Server, live: Live) -> None:
        following = asyncio.create_task(live.follow())
        ending = asyncio.create_task(_release(server, live))
        try:
            await server.serve(sockets=[self._socket])
        finally:
            following.cancel()
            ending.cancel()
            await asyncio.gather(following, ending, return_exceptions=True)


async def _release(server: uvicorn.Server, live: Live) -> None:
    """Let the watchers go when the server is to end: it waits for them."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    live.stop()


def _bound(address: str) -> socket.socket:
    host, port = split_address(address)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host.strip("[]"), port))
        found.listen(64)
    except OSError as error:
        found.close()
        raise AlreadyServing(
            f"cannot serve the page at {address}: {error.strerror}; choose another address "
            "(dashboard.address, --dashboard)"
        ) from error
    found.setblocking(False)
    return found
