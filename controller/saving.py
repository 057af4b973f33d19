"""When the policy's state is saved, and that it was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from controller.hands import Hands
from controller.snapshots import SavePace
from protos.types import Step

logger = logging.getLogger(__name__)


class Saving:
    """Snapshots on their way to the disk, beside the decisions. Lives on the event loop."""

    def __init__(self, hands: Hands, pace: SavePace, *, saved_through: int) -> None:
        self.saved_through = saved_through
        """The last step that a snapshot covers."""

        self._hands = hands
        self._pace = pace
        self._tasks: set[asyncio.Task[str]] = set()

    def ends_with(self, step: Step) -> bool:
        """Say whether the policy may have to be saved as it is after `step`."""
        return self._pace.ends_with(step)

    def is_due(self, step: Step) -> bool:
        """Say whether to save the policy now, after `step`."""
        # A disk that is slower than that gets fewer snapshots, not a queue of copies.
        learns = self._hands.policy.learns
        return not self._tasks and self._pace.is_due(step, learns=learns)

    def start(self, step: Step, record: Callable[[str], Awaitable[None]]) -> asyncio.Task[str]:
        """Save the policy as it is now, after `step`; `record` notes where in the ledger."""
        hands, self.saved_through = self._hands, step
        hands.shadows.save(step)
        future = hands.policy.save(lambda state: hands.snapshots.write(state, step))

        async def save() -> str:
            path = await asyncio.wrap_future(future)
            await record(str(path))
            return str(path)

        task = asyncio.create_task(save())
        self._tasks.add(task)
        task.add_done_callback(self._saved)
        return task

    async def finish(self, timeout_s: float) -> None:
        """Wait until what is being saved is saved."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _saved(self, task: asyncio.Task[str]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the policy's state was not saved: %s", error)
