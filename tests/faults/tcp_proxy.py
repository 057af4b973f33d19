"""A TCP proxy that makes a network misbehave on demand, and counts how often it did.

thread     does                                       waits for
tcp-proxy  an event loop that copies between sockets  traffic, the caller's commands
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST instead of FIN."""

T = TypeVar("T")


@dataclass(slots=True)
class Counts:
    """What the proxy has done so far."""

    connections: int = 0
    resets: int = 0
    cut_short: int = 0
    """Connections that were reset in the middle of what was sent."""

    held: int = 0
    """Pieces of traffic that waited while there was silence."""

    delayed: int = 0


@dataclass(slots=True)
class Weather:
    """How the network behaves now; changed while it is in use."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Evenly drawn, to either side. What one connection carries stays in order, as TCP has it;
    messages of several connections overtake one another."""

    silent_to_server: bool = False
    silent_to_client: bool = False
    """Nothing gets through and nobody is told, as behind a firewall that drops."""


class FaultProxy:
    """Passes connections to `listen` on to `target`, both `host:port`."""

    def __init__(self, target: str, *, listen: str = "127.0.0.1:0", seed: int = 0) -> None:
        self._target = _host_and_port(target)
        self._listen = _host_and_port(listen)
        self._draw = random.Random(seed)
        self._weather = Weather()
        self._open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._cut_next = 0
        self.counts = Counts()
        self.address = ""
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def become(self, weather: Weather) -> None:
        """Behave like this from now on."""
        self._do(lambda: setattr(self, "_weather", weather))

    def reset_all(self) -> int:
        """Break all connections with RST; return how many there were."""
        return self._do(self._reset_all)

    def cut_short(self, number: int) -> None:
        """Break the next so many connections that carry something, in the middle of it."""
        self._do(lambda: setattr(self, "_cut_next", self._cut_next + number))

    def num_open(self) -> int:
        """Return how many connections there are now."""
        return self._do(lambda: len(self._open))

    def _do(self, action: Callable[[], T]) -> T:
        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _serve(self) -> asyncio.Server:
        host, port = self._listen
        return await asyncio.start_server(self._connected, host, port, reuse_address=True)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        self._weather = Weather()
        # The copies come to their ends by themselves once their connections have.
        self._reset_all()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if rest:
            await asyncio.wait(rest, timeout=5)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            above, up = await asyncio.open_connection(*self._target)
        except OSError:
            _break(writer)
            return
        self.counts.connections += 1
        pair = (writer, up)
        self._open.add(pair)
        try:
            await asyncio.gather(
                self._copy(reader, up, pair, to_server=True),
                self._copy(above, writer, pair, to_server=False),
            )
        except OSError:
            pass
        finally:
            self._open.discard(pair)
            for end in pair:
                end.close()

    async def _copy(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        *,
        to_server: bool,
    ) -> None:
        while data := await reader.read(_CHUNK):
            await self._wait(to_server)
            if self._cut_next and len(data) > 1:
                self._cut_next -= 1
                self.counts.cut_short += 1
                writer.write(data[: len(data) // 2])
                await writer.drain()
                for end in pair:
                    _break(end)
                return
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def _wait(self, to_server: bool) -> None:
        weather = self._weather
        if weather.delay_s or weather.jitter_s:
            self.counts.delayed += 1
            jitter = self._draw.uniform(-weather.jitter_s, weather.jitter_s)
            await asyncio.sleep(max(weather.delay_s + jitter, 0.0))
        if self._is_silent(to_server):
            self.counts.held += 1
            while self._is_silent(to_server):
                await asyncio.sleep(0.02)

    def _is_silent(self, to_server: bool) -> bool:
        weather = self._weather
        return weather.silent_to_server if to_server else weather.silent_to_client

    def _reset_all(self) -> int:
        broken = list(self._open)
        for pair in broken:
            for end in pair:
                _break(end)
        self.counts.resets += len(broken)
        return len(broken)


def _break(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    if end is not None and end.fileno() >= 0:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
