"""Join as the ranks see it: wait for one another and for loader workers, then start together."""

from __future__ import annotations

import asyncio
import logging

from controller.loop import ControlLoop
from controller.membership import Gathering, JoinBarrier, Membership, timed_out
from controller.threads import Signal
from controller.workers import Workers
from protos.errors import ConfigError, HeadraceError, LedgerError, NotReady, StaleGeneration
from protos.types import JoinAnswer, JoinRequest, LaneEndpoint

logger = logging.getLogger(__name__)


class Joining:
    """Brings gathered ranks and enlisted workers together.

    caller      call             waits for                        woken by
    rank        join             all ranks, then all lanes        offer, workers_changed
    worker      workers_changed  nothing                          -
    """

    def __init__(self, loop: ControlLoop, workers: Workers) -> None:
        self._loop = loop
        self._workers = workers
        self._barrier = JoinBarrier(loop.state.spec)
        self._workers_came = Signal()
        self._starting: set[asyncio.Task[None]] = set()

    def workers_changed(self) -> None:
        """Look again at whether all lanes are served."""
        self._workers_came.notify()
        self._start_if_ready()

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """Answer when all ranks are there; see `ControlService.join`."""
        if self._loop.is_drained:
            raise ConfigError(
                f"rank {request.rank} cannot join: the controller was drained and decides no more; "
                "start it again to train on"
            )
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        membership = self._loop.state.membership
        if membership is None or not membership.is_member(request):
            membership = await self._gather(request, deadline)
        endpoints = await self._all_lanes_served(request, deadline)
        spec = self._loop.state.spec
        lanes = membership.lanes_of(request.rank, spec)
        return JoinAnswer(
            generation=membership.generation,
            spec=spec,
            first_step=membership.first_step,
            endpoints=endpoints,
            cursors={lane: membership.cursors[lane] for lane in lanes},
            cursor_steps={lane: membership.cursor_steps[lane] for lane in lanes},
            lanes_version=self._workers.lanes_version,
        )

    def close(self, reason: str) -> None:
        """Send all who wait away; they may ask again."""
        self._barrier.gathering.end(NotReady(reason))

    async def _gather(self, request: JoinRequest, deadline: float) -> Membership:
        gathering = self._barrier.offer(request)
        ended = asyncio.Event()
        gathering.on_end.append(ended.set)
        self._start_if_ready()
        try:
            async with asyncio.timeout_at(deadline):
                await ended.wait()
        except TimeoutError:
            # Nobody is left where another process of this rank came and went meanwhile.
            if not gathering.requests or gathering.missing():
                raise timed_out(gathering, request) from None
            raise self._no_workers(request) from None
        finally:
            # Ranks that try again and again for days leave nothing behind.
            gathering.on_end.remove(ended.set)
            self._barrier.withdraw(gathering, request)
        return _own(gathering, request)

    async def _all_lanes_served(
        self, request: JoinRequest, deadline: float
    ) -> tuple[LaneEndpoint, ...]:
        while not (endpoints := self._workers.endpoints()):
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise self._no_workers(request)
            await self._workers_came.wait_beyond(self._workers_came.count, left)
        return endpoints

    def _no_workers(self, request: JoinRequest) -> NotReady:
        return NotReady(
            f"rank {request.rank} waited {request.timeout_s:g} s, but no loader worker serves all "
            f"of the {self._loop.state.spec.lanes} lanes yet; start loader workers"
        )

    def _start_if_ready(self) -> None:
        gathering = self._barrier.gathering
        if self._workers.serve_all_lanes and self._barrier.starting(gathering):
            task = asyncio.create_task(self._start(gathering))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, gathering: Gathering) -> None:
        try:
            gathering.end(await self._loop.begin(gathering))
        except HeadraceError as error:
            gathering.end(error)
        except Exception:
            logger.exception("a generation could not begin")
            gathering.end(LedgerError("the generation could not begin; see the controller's log"))
            raise


def _own(gathering: Gathering, request: JoinRequest) -> Membership:
    outcome = gathering.outcome
    if isinstance(outcome, HeadraceError):
        raise outcome
    assert outcome is not None
    if not outcome.is_member(request):
        raise StaleGeneration(
            f"rank {request.rank} joined generation {outcome.generation} as another process, which "
            "took this one's place"
        )
    return outcome
