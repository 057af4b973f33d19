"""What the page asks of a controller: the calls that operators have over gRPC, and a preview."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from controller.guard import GuardResult
from protos.errors import NotReady
from protos.status import RunStatus
from protos.types import StepReport

T = TypeVar("T")

ANSWER_S = 5.0
"""How long the control loop may take to answer the page."""

WORK_S = 60.0
"""The same where it saves the policy's state."""


class Operated(Protocol):
    """A controller, on its own event loop."""

    def on_written(self, call: Callable[[], None]) -> None:
        """Have `call` run on the control loop whenever the ledger was written, or could not be."""

    async def status(self) -> RunStatus:
        """Say how the run stands."""

    async def newest_reports(self) -> tuple[StepReport, ...]:
        """Return what the ranks said of the newest step."""

    async def preview(self, shares: Mapping[str, float]) -> GuardResult:
        """Say what the guard would make of a mixture, were it the policy's proposal."""

    async def set_mixture(self, shares: Mapping[str, float]) -> int:
        """Override the policy; return the first step that obeys."""

    async def freeze(self) -> None:
        """Hold the mixture in force."""

    async def resume(self) -> None:
        """Give the decision back to the policy."""

    async def snapshot_policy(self) -> str:
        """Save the policy's state; return where it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """The way from the page's thread to a controller on another event loop."""

    controller: Operated
    loop: asyncio.AbstractEventLoop

    async def ask(self, call: Coroutine[Any, Any, T], timeout_s: float = ANSWER_S) -> T:
        """Have the control loop run `call`; return what it gives.

        Raises:
            NotReady: there is no answer within `timeout_s`, or the controller stops.
            HeadraceError: what the call raises.
        """
        try:
            future: Future[T] = asyncio.run_coroutine_threadsafe(call, self.loop)
        except RuntimeError:
            call.close()
            raise NotReady("the controller stops") from None
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise NotReady(f"the controller does not answer within {timeout_s:g} s") from None
