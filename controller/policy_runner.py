"""Runs the policy beside the event loop, within a time budget and in the order of the steps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.ledger_schema import StepRecord
from controller.observation import StepObservation
from controller.policy.base import Diagnosed, Learner, Policy, PolicyState
from controller.threads import SingleThread
from protos.types import Step

logger = logging.getLogger(__name__)

MAX_BACKLOG = 32
"""Steps that a slow policy may be behind; later ones it does not get to see."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What came of asking the policy."""

    shares: tuple[float, ...] | None
    """None: nothing came in time."""

    fault: str = ""
    """Why there are no shares."""

    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """What the policy says of itself after the observation; empty: it says nothing."""


class PolicyRunner:
    """Owns the policy: nothing else touches it once the runner has begun.

    thread           does                            waits for
    policy           observe, propose, learn, copy   its queue
    policy-writer    write copies to files           its queue, a copy
    """

    def __init__(self, policy: Policy, *, budget_s: float) -> None:
        self._policy = policy
        self._budget_s = budget_s
        self._thread = SingleThread("headrace-policy")
        self._writer = SingleThread("headrace-policy-writer")
        self._backlog = 0
        self._unlearned = ""
        """Why the policy did not learn from its last observation."""

        self.name = policy.name
        self.learns = bool(policy.needs)
        """False: what it proposes for a step is known before the run begins."""

        self.phase = policy.phase
        """What the policy was doing when it last came back."""

    @property
    def is_behind(self) -> bool:
        """Whether so many steps wait for the policy that another would be too many."""
        return self._backlog >= MAX_BACKLOG

    async def advise(self, observation: StepObservation, step: Step) -> Advice:
        """Have the policy observe and propose for `step`.

        If it takes longer than the budget it goes on by itself, and what it then proposes is not
        used; the next observation comes after this one all the same.
        """
        self._backlog += 1
        future = asyncio.wrap_future(self._thread.submit(self._turn, observation, step))
        future.add_done_callback(self._ended)
        self._thread.submit(self._learn)
        fault = await self._fault(future, observation.step)
        return Advice(shares=None, fault=fault) if fault else future.result()

    async def advise_ahead(
        self, observations: Sequence[StepObservation], steps: range
    ) -> list[Advice]:
        """Have a policy that does not learn propose for many steps, within the budget of one."""
        future = asyncio.wrap_future(self._thread.submit(self._turns, observations, steps))
        fault = await self._fault(future, observations[-1].step)
        if fault:
            return [Advice(shares=None, fault=fault)] * len(steps)
        return [Advice(shares=shares) for shares in future.result()]

    async def _fault(self, future: asyncio.Future[Any], step: Step) -> str:
        """Wait for the policy; return what went wrong, empty if nothing did."""
        done, _ = await asyncio.wait({future}, timeout=self._budget_s)
        if not done:
            return f"the policy took more than {self._budget_s:g} s"
        error = future.exception()
        if error is not None:
            logger.error("policy failed step=%d", step, exc_info=error)
            return f"the policy failed: {type(error).__name__}: {error}"
        return ""

    def save(self, write: Callable[[PolicyState], Path]) -> Future[Path]:
        """Have `write` save the policy's state as it is after all observations given so far.

        The policy waits for a copy of its state alone: it is written on a thread of its own.
        """
        copied = self._thread.submit(self._policy.state)
        return self._writer.submit(lambda: write(copied.result()))

    async def restore(self, state: PolicyState | None, records: Iterable[StepRecord]) -> None:
        """Bring the policy to where it was: a saved state, and what it observed after that.

        Raises:
            ValueError: the state does not fit the policy.
        """
        await self._thread.call(self._replay, state, records)

    def close(self, timeout_s: float) -> None:
        """Let the policy end what it is at."""
        if not self._thread.close(timeout_s):
            logger.warning("the policy has not come back within %g s; left behind", timeout_s)
        if not self._writer.close(timeout_s):
            logger.warning("the policy's state is not written after %g s; left behind", timeout_s)

    def _turn(self, observation: StepObservation, step: Step) -> Advice:
        policy = self._policy
        policy.observe(observation)
        shares = tuple(float(share) for share in policy.propose(step))
        self.phase = policy.phase
        if self._unlearned:
            fault, self._unlearned = self._unlearned, ""
            return Advice(shares=None, fault=fault)
        diagnostics = policy.diagnostics() if isinstance(policy, Diagnosed) else {}
        return Advice(shares=shares, diagnostics=diagnostics)

    def _turns(
        self, observations: Sequence[StepObservation], steps: range
    ) -> list[tuple[float, ...]]:
        for observation in observations:
            self._policy.observe(observation)
        return [tuple(float(share) for share in self._policy.propose(Step(step))) for step in steps]

    def _learn(self) -> None:
        if not isinstance(self._policy, Learner):
            return
        try:
            self._policy.learn()
        except Exception as error:
            logger.exception("policy failed to learn")
            self._unlearned = f"the policy failed to learn: {type(error).__name__}: {error}"

    def _replay(self, state: PolicyState | None, records: Iterable[StepRecord]) -> None:
        if state is not None:
            self._policy.restore(state)
        for record in records:
            if not record.to_policy:
                continue
            try:
                self._turn(record.observation, record.proposed_step)
            except Exception as error:  # noqa: BLE001  it failed in the same way the first time
                logger.warning("policy failed again step=%d: %s", record.observation.step, error)
            self._learn()
        self.phase = self._policy.phase

    def _ended(self, future: asyncio.Future[Advice]) -> None:
        self._backlog -= 1
        if not future.cancelled() and future.exception() is not None:
            logger.debug("the policy's turn ended in an error", exc_info=future.exception())
