"""The controller as a Ray actor. The only file here that imports ray."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future

import ray

from controller.app import run_controller
from controller.config import RunConfig
from controller.tracing import tracing
from protos.client import AdminClient
from protos.errors import ConfigError, NotReady
from protos.log_format import configure_logging


class ControllerHost:
    """Runs a controller on a thread with an event loop of its own. STARTING -> SERVING -> STOPPED.

    A thread, so that the actor's own calls are answered whatever the controller does.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        configure_logging()
        self._address: Future[str] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, timeout_s: float = 60.0) -> str:
        """Start serving; return the address. Twice does no harm.

        Raises:
            HeadraceError: what kept the controller from serving.
            NotReady: it does not serve within `timeout_s`.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="headrace-controller")
            self._thread.daemon = True
            self._thread.start()
        return self.address(timeout_s)

    def address(self, timeout_s: float = 5.0) -> str:
        """Return where the controller serves.

        Raises:
            NotReady: it does not serve within `timeout_s`.
        """
        try:
            return self._address.result(timeout_s)
        except TimeoutError:
            raise NotReady(f"the controller does not serve after {timeout_s:g} s") from None

    def check(self) -> None:
        """Do nothing while the controller serves.

        Raises:
            HeadraceError: what has ended it.
        """
        if self._error is not None:
            raise self._error
        if self._thread is not None and not self._thread.is_alive():
            raise NotReady("the controller has stopped")

    def stop(self, timeout_s: float = 30.0, *, drain: bool = True) -> None:
        """Tell the workers that the run is over, save everything, stop. Twice does no harm."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        if self._thread.is_alive():
            if drain:
                self.drain(timeout_s)
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise NotReady(f"the controller has not stopped after {timeout_s:g} s")

    def drain(self, timeout_s: float = 30.0) -> None:
        """Tell workers and ranks that the run is over. Does nothing where nothing is served."""
        if not self._address.done() or self._error is not None:
            return
        client = AdminClient(self._address.result(), security=self._config.wire_security)
        try:
            client.drain(timeout_s=timeout_s)
        finally:
            client.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  handed on to whoever asks
            self._error = error
            if not self._address.done():
                self._address.set_exception(error)
        if not self._address.done():
            self._address.set_exception(ConfigError("the controller stopped before it served"))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        with tracing(os.environ):
            await run_controller(self._config, on_ready=self._address.set_result, stop=self._stop)


ControllerActor = ray.remote(ControllerHost)
"""`ControllerActor.options(name=...).remote(config)`; then `start`, `address`, `check`, `stop`."""
