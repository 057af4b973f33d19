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


class SlowLearner(ScriptedPolicy):
    """Learns only when it is let, and fails the first times if told to."""

    def __init__(self, *, failures: int = 0) -> None:
        super().__init__(lambda step: (0.2, 0.3, 0.5))
        self.may_learn = threading.Event()
        self.num_failures = failures
        self.num_learned = 0

    def learn(self) -> None:
        assert self.may_learn.wait(30)
        if self.num_failures:
            self.num_failures -= 1
            raise ArithmeticError("a gradient that is not finite")
        self.num_learned += 1


def test_nobody_waits_for_what_a_policy_learns_from_a_step() -> None:
    policy = SlowLearner()
    runner = PolicyRunner(policy, budget_s=10.0)

    async def play() -> None:
        await advise(runner, range(1))
        assert policy.num_learned == 0
        policy.may_learn.set()
        await advise(runner, range(1, 3))
        assert policy.num_learned >= 2  # the next turn comes after what was to be learned

    asyncio.run(play())
    runner.close(5.0)


def test_a_policy_that_fails_to_learn_is_not_followed_until_it_does() -> None:
    policy = SlowLearner(failures=1)
    policy.may_learn.set()
    runner = PolicyRunner(policy, budget_s=10.0)

    async def play() -> None:
        await advise(runner, range(1))
        advice = await runner.advise(RUN.observation(1, (0.5, 0.25, 0.25)), Step(3))
        assert advice.shares is None
        assert "failed to learn: ArithmeticError" in advice.fault
        await advise(runner, range(2, 4))

    asyncio.run(play())
    runner.close(5.0)
