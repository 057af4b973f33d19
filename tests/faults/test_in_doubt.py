"""A plan that was written down and not heard in time: what ranks trained instead is what counts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.ledger_schema import Kind, Row
from deploy.reading.replay import Replay
from protos.failpoints import VARIABLE
from tests.fakes_consumer import write_corpus
from tests.fakes_trainer import wait_until
from tests.faults.checker import Evidence, check, read_events, read_evidence
from tests.faults.processes import FaultRun, fault_run, write_fault_run
from tests.faults.tcp_proxy import FaultProxy, Weather

pytestmark = pytest.mark.slow

NUM_STEPS = 4000
STEP_S = 0.05
NUM_ALONE = 6
"""Steps that each rank trains at least without a controller."""

DIES_IN_SILENCE = {VARIABLE: "plans.broadcast:8:kill"}
"""Step 6's decision is the first to bring a plan that no worker hears of."""


def _write_run(tmp_path: Path) -> Path:
    return write_fault_run(
        tmp_path / "out",
        write_corpus(tmp_path / "data", documents=(600, 450, 300)),
        steps=NUM_STEPS,
        policy={"name": "odm", "warmup_steps": 4},
        control={"degraded_after_s": 1.5, "snapshot_every": 1000},
    )


@contextmanager
def _killed_run(tmp_path: Path, *environments: dict[str, str]) -> Iterator[FaultRun]:
    """A run of 2 workers and 2 ranks whose controller dies, and comes back too late."""
    with fault_run(
        _write_run(tmp_path),
        environments=environments,
        may_start_again=lambda run: run.num_alone() >= NUM_ALONE,
    ) as run:
        run.start_ranks(2, until=NUM_STEPS, step_s=STEP_S)
        run.controller.wait_starts(len(environments))
        yield run


def _train_on(run: FaultRun, steps: int = 20) -> None:
    """Train until so many steps are decided upon after the last one that ranks had alone."""
    run.controller.wait_ready()
    wait_until(lambda: run.last_logged_step() > max(_alone(run.out)) + 2, timeout_s=60)
    run.wait_observed(max(_alone(run.out)) + steps)
    assert run.are_training(), run.ranks[0].log.read_text()[-2000:]
    for rank in run.ranks:
        rank.process.kill()
        rank.process.wait(30)


def _alone(out: Path) -> list[int]:
    steps = (event for event in read_events(out) if event["event"] == "step")
    return sorted({event["step"] for event in steps if event["degraded"]})


def _amends(evidence: Evidence) -> list[Row]:
    return [row for row in evidence.rows if row.kind is Kind.AMEND]


def _assert_whole(run: FaultRun, tmp_path: Path) -> Evidence:
    """Nothing is broken, and the ledger alone gives back what the ranks consumed, to the byte."""
    assert check(run.out) == []
    evidence, findings = read_evidence(run.out)
    assert findings.obedience.plans_obeyed
    consumed: dict[int, dict[int, str]] = {}
    for delivery in evidence.deliveries:
        consumed.setdefault(delivery.step, {})[delivery.slot] = delivery.sha256
    whole = [step for step, slots in consumed.items() if len(slots) == evidence.global_sequences]
    with Replay(run.out, first=0, end=max(whole) + 1, cache=tmp_path / "replayed") as replay:
        assert replay.otherwise == []
        for step in replay:
            came = [consumed[step.step][slot] for slot in range(evidence.global_sequences)]
            assert step.digests() == came, f"step {step.step} is replayed otherwise"
    return evidence


@pytest.mark.fault_row(2, "controller SIGKILL after a commit, back after workers went on alone")
@pytest.mark.timeout(120)
def test_a_plan_that_nobody_heard_of_gives_way_to_what_was_trained(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with _killed_run(tmp_path, DIES_IN_SILENCE) as run:
        assert run.controller.starts[0].exit_status == -signal.SIGKILL
        _train_on(run)
    evidence, alone = _assert_whole(run, tmp_path), _alone(run.out)
    amend = _amends(evidence)[0]
    assert amend.body["lanes"] is None
    assert amend.step == alone[0]
    assert amend.body["through"] in alone
    plans = [row.body["version"] for row in evidence.rows if row.kind is Kind.PLAN]
    assert plans == list(range(1, len(plans) + 1)), "a void plan's number is not given again"
    assert max(plans) > amend.body["version"] + 1, "decisions go on"
    record_injections(1, f"{len(alone)} steps trained alone")


@pytest.mark.long
@pytest.mark.fault_row(2, "controller SIGKILL around the commit that makes a plan void")
@pytest.mark.timeout(180)
def test_a_controller_killed_while_it_amends_plans_comes_back_to_the_same(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    places = ("ledger.amend.before", "ledger.amend.after")
    kills = [{VARIABLE: f"{place}:1:kill"} for place in places]
    with _killed_run(tmp_path, DIES_IN_SILENCE, *kills) as run:
        assert [start.exit_status for start in run.controller.starts] == [-signal.SIGKILL] * 3
        _train_on(run)
    evidence = _assert_whole(run, tmp_path)
    assert _amends(evidence)[0].body["lanes"] is None
    record_injections(3)


@pytest.mark.long
@pytest.mark.fault_row(9, "one of two workers hears nothing of the controller for a while")
@pytest.mark.timeout(180)
def test_where_one_of_two_workers_heard_a_plan_its_lanes_have_it_and_the_others_are_recorded(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    with fault_run(_write_run(tmp_path), num_workers=0) as run, FaultProxy(run.address) as proxy:
        run.controller.wait_ready()
        run.add_worker("w0")
        own, run.address = run.address, proxy.address
        run.add_worker("w1")
        run.address = own
        run.start_ranks(2, until=NUM_STEPS, step_s=STEP_S)
        run.wait_observed(5)
        proxy.become(Weather(silent_to_client=True))
        wait_until(lambda: len(_alone(run.out)) >= NUM_ALONE, timeout_s=60)
        proxy.become(Weather())
        _train_on(run)
    evidence = _assert_whole(run, tmp_path)
    lanes: set[Any] = {tuple(row.body["lanes"] or ()) for row in _amends(evidence)}
    assert lanes
    assert () not in lanes, "a plan that a worker heard of is not void"
    assert proxy.counts.held > 0
    record_injections(1, f"{len(_amends(evidence))} amendments")
