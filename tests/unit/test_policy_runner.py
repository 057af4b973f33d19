"""What surrounds a policy: saving its state must not make decisions wait."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from controller.policy.base import PolicyState
from controller.policy_runner import PolicyRunner
from protos.types import Step
from tests.fakes_controller import ScriptedPolicy
from tests.fakes_policy import SimulatedRun, make_context

RUN = SimulatedRun(context=make_context())


async def advise(runner: PolicyRunner, steps: range) -> None:
    for step in steps:
        observation = RUN.observation(step, (0.5, 0.25, 0.25))
        advice = await runner.advise(observation, Step(step + 2))
        assert advice.shares == (0.2, 0.3, 0.5)


def test_a_disk_that_does_not_answer_keeps_no_decision_waiting() -> None:
    runner = PolicyRunner(ScriptedPolicy(lambda step: (0.2, 0.3, 0.5)), budget_s=5.0)
    written: list[PolicyState] = []
    disk = threading.Event()

    def write(state: PolicyState) -> Path:
        disk.wait(30)
        written.append(state)
        return Path("there")

    async def play() -> None:
        await advise(runner, range(3))
        saving = runner.save(write)
        await advise(runner, range(3, 8))
        assert not written
        disk.set()
        assert await asyncio.wrap_future(saving) == Path("there")

    asyncio.run(play())
    # Written late, it is still the state at the time of asking.
    assert [state.values["num_turns"] for state in written] == [3]
    runner.close(5.0)


def test_what_the_disk_says_comes_to_whoever_saves() -> None:
    runner = PolicyRunner(ScriptedPolicy(lambda step: (0.2, 0.3, 0.5)), budget_s=5.0)

    def write(state: PolicyState) -> Path:
        raise OSError("the disk is full")

    assert isinstance(runner.save(write).exception(5.0), OSError)
    assert runner.save(lambda state: Path("there")).result(5.0) == Path("there")
    runner.close(5.0)
