"""A controller from its run file to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from controller import history as past
from controller.config import RunConfig
from controller.hands import Hands, Pace
from controller.history import History
from controller.ledger import Ledger
from controller.loop import ControlLoop
from controller.metrics import Metrics
from controller.metrics_server import CALL_S, serving_metrics
from controller.policy import artefact
from controller.policy_runner import PolicyRunner
from controller.prepare import Prepared, check_port, prepare, take_page
from controller.service import Service
from controller.shadows import Shadows
from controller.snapshots import Snapshots
from controller.state import RunState
from controller.threads import SingleThread
from controller.workers import Workers
from protos.errors import AlreadyServing, ConfigError
from protos.log_format import set_coordinates
from protos.server import serving_controller

logger = logging.getLogger(__name__)

DRAIN_S = 2.0
"""How long calls under way may go on when the controller stops."""

SAVE_S = 10.0
"""How long saving the policy may take when the controller stops."""

LOOK_AGAIN_S = 0.1
"""How often a standby looks whether the ledger is free."""


async def run_controller(
    config: RunConfig,
    *,
    on_ready: Callable[[str], None],
    stop: asyncio.Event,
    standby: bool = False,
    on_page: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a run until `stop` is set; `on_ready` hears the address, `on_page` that of the page.

    A `standby` gets all ready and then waits for as long as another controller has the ledger.

    Raises:
        AlreadyServing: another controller holds the ledger or the port.
        ConfigError: settings contradict one another, the data or the ledger.
        DataError: the index or the tokenizer cannot be used.
        LedgerError: the ledger is damaged or cannot be written.
    """
    set_coordinates(run=config.run)
    prepared = await asyncio.to_thread(prepare, config)
    if not standby:
        check_port(config.address)
    async with AsyncExitStack() as stack:
        ledger_thread = SingleThread("headrace-ledger")
        stack.callback(ledger_thread.close, 10.0)
        ledger = await _open_ledger(config, ledger_thread, stop=stop, standby=standby)
        if ledger is None:
            return
        stack.push_async_callback(ledger_thread.call, ledger.close)
        page = take_page(config)
        if page is not None:
            stack.callback(page.close)
        history = await ledger_thread.call(_open_history, ledger, config, prepared)
        runner = PolicyRunner(prepared.policy, budget_s=config.guard.time_budget_s)
        stack.callback(runner.close, config.guard.time_budget_s)
        await bring_up(runner, history, ledger, ledger_thread)
        shadows = make_shadows(config, prepared)
        stack.callback(shadows.close, SAVE_S)
        await shadows.restore(
            lambda after: ledger_thread.call(lambda: list(past.shadow_records_after(ledger, after)))
        )
        loop, service = _assemble(config, prepared, history, ledger, ledger_thread, runner, shadows)
        deciding = await stack.enter_async_context(_deciding(loop))
        address = await stack.enter_async_context(
            serving_controller(
                service,
                service,
                address=config.address,
                security=config.wire_security,
                drain_s=DRAIN_S,
                is_deciding=lambda: service.is_deciding,
            )
        )
        stack.callback(service.stop)
        if config.metrics.address is not None:
            url = stack.enter_context(_metrics(config, config.metrics.address, service))
            logger.info("metrics url=%s", url)
        if page is not None:
            await stack.enter_async_context(page.serving(service, prepared.spec))
            on_page(page.url)
        logger.info("serving run=%s address=%s", prepared.spec.run_id, address)
        on_ready(address)
        await _until(stop, deciding)


@contextlib.contextmanager
def _metrics(config: RunConfig, address: str, service: Service) -> Iterator[str]:
    """Serve the figures; each call reads them on the event loop, where they change."""
    loop, security = asyncio.get_running_loop(), config.wire_security

    def read() -> list[Any]:
        asked = asyncio.run_coroutine_threadsafe(service.figures(), loop)
        try:
            return asked.result(CALL_S)
        except TimeoutError:
            asked.cancel()
            raise

    with serving_metrics(address, security, config.metrics.token_of(security), read) as url:
        yield url


async def _open_ledger(
    config: RunConfig, ledger_thread: SingleThread, *, stop: asyncio.Event, standby: bool
) -> Ledger | None:
    """Open the ledger; a standby waits for it. None: it was stopped meanwhile."""
    waits = False
    while True:
        try:
            ledger = await ledger_thread.call(Ledger, config.ledger_path)
        except AlreadyServing as error:
            if not standby:
                raise
            level = logging.DEBUG if waits else logging.WARNING
            logger.log(level, "standing by: %s", error)
            waits = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await stop.wait()
            if stop.is_set():
                return None
            continue
        if waits:
            logger.warning("the ledger is free: this controller takes over")
        return ledger


def _open_history(ledger: Ledger, config: RunConfig, prepared: Prepared) -> History:
    settings = config.model_dump(mode="json")
    past.begin(ledger, prepared.spec, prepared.initial, settings)
    return past.read_history(ledger, prepared.spec)


async def bring_up(
    runner: PolicyRunner, history: History, ledger: Ledger, ledger_thread: SingleThread
) -> None:
    """Bring the policy to where it was: the newest snapshot that fits, and what came after it."""
    for step, path in [*history.snapshots, (-1, None)]:
        if path is not None and not path.is_file():
            continue
        records = await ledger_thread.call(
            lambda after: list(past.records_after(ledger, after)), step
        )
        try:
            state = artefact.load(path) if path is not None else None
            await runner.restore(state, records)
        except (ConfigError, ValueError) as error:
            logger.warning("the policy's state %s cannot be used: %s", path, error)
            continue
        logger.info("policy replayed %d steps after step %d", len(records), step)
        return


def make_shadows(config: RunConfig, prepared: Prepared) -> Shadows:
    """Return the shadow policies, before their first step."""
    return Shadows(
        prepared.shadows,
        budget_s=config.guard.time_budget_s,
        folder=config.snapshots_path / "shadows",
        origin=config.origin,
    )


def _assemble(
    config: RunConfig,
    prepared: Prepared,
    history: History,
    ledger: Ledger,
    ledger_thread: SingleThread,
    runner: PolicyRunner,
    shadows: Shadows,
) -> tuple[ControlLoop, Service]:
    now = time.monotonic
    workers = Workers(prepared.spec, expiry_s=config.control.worker_timeout_s, now=now)
    workers.epoch = ledger.epoch
    workers.expect(history.workers)
    workers.quarantine(history.quarantines)
    workers.wanted = history.wanted_workers
    metrics = Metrics(prepared.spec.num_domains, history.totals, now=now)
    hands = Hands(
        ledger=ledger,
        ledger_thread=ledger_thread,
        policy=runner,
        guard=prepared.guard,
        workers=workers,
        snapshots=Snapshots(config.snapshots_path, origin=config.origin),
        metrics=metrics,
        shadows=shadows,
    )
    pace = Pace(
        report_grace_s=config.control.report_grace_s,
        snapshot_every=config.control.snapshot_every,
        keep_steps=config.ledger.keep_steps,
    )
    state = RunState(prepared.spec, history, now=now)
    loop = ControlLoop(state, hands, steering=history.steering, pace=pace, now=now)
    service = Service(
        loop,
        workers=workers,
        metrics=metrics,
        policy=runner,
        shadows=shadows,
        blobs=prepared.blobs,
        bad_share=prepared.bad_share,
    )
    return loop, service


@asynccontextmanager
async def _deciding(loop: ControlLoop) -> AsyncIterator[asyncio.Task[None]]:
    """Run the decision loop; at the end save the policy and what was noted."""
    task = asyncio.create_task(loop.run())
    try:
        yield task
    finally:
        await loop.stop(task, timeout_s=SAVE_S)


async def _until(stop: asyncio.Event, deciding: asyncio.Task[None]) -> None:
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({stopping, deciding}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if deciding.done():
        deciding.result()
