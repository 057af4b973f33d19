"""Loader workers as the controller sees them."""

from __future__ import annotations

import pytest

from controller.workers import Workers
from protos.errors import InvalidMessage, WrongRun
from protos.types import Generation, Quarantine
from tests.fakes_controller import Clock, make_beat
from tests.unit.test_membership import SPEC


def _lanes(workers: Workers) -> list[str]:
    return [endpoint.worker_id for endpoint in workers.endpoints()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(clock: Clock) -> Workers:
    return Workers(SPEC, expiry_s=10, now=clock)


def test_lanes_go_in_contiguous_groups_to_workers_by_name(workers: Workers) -> None:
    assert workers.endpoints() == ()
    for name in ("c", "a", "b"):
        workers.beat(make_beat(name))
    assert _lanes(workers) == ["a", "a", "b", "c"]


def test_a_worker_takes_no_more_lanes_than_it_can(workers: Workers) -> None:
    workers.beat(make_beat("a", capacity_lanes=1))
    assert workers.endpoints() == ()
    workers.beat(make_beat("b", capacity_lanes=2))
    assert workers.endpoints() == ()
    workers.beat(make_beat("c"))
    assert _lanes(workers) == ["a", "b", "c", "c"]


def test_a_silent_worker_is_lost_and_its_lanes_go_to_others(workers: Workers, clock: Clock) -> None:
    workers.beat(make_beat("a"))
    workers.beat(make_beat("b"))
    clock.now_s += 9
    workers.beat(make_beat("b"))
    clock.now_s += 2
    assert workers.expire() == ["a"]
    assert workers.expire() == []
    assert _lanes(workers) == ["b"] * 4
    assert workers.beat(make_beat("a"))
    assert _lanes(workers) == ["a", "a", "b", "b"]


def test_a_worker_that_came_back_as_another_process_is_new(workers: Workers) -> None:
    assert workers.beat(make_beat("a", pid=1))
    assert not workers.beat(make_beat("a", pid=1))
    assert workers.beat(make_beat("a", pid=2))


def test_degraded_steps_add_up_over_the_processes_of_a_worker(workers: Workers) -> None:
    workers.beat(make_beat("a", pid=1, degraded_steps=3))
    workers.beat(make_beat("a", pid=1, degraded_steps=5))
    workers.beat(make_beat("a", pid=2, degraded_steps=2))
    workers.beat(make_beat("b", degraded_steps=6))
    assert workers.num_degraded == 7


def test_only_what_is_said_of_the_generation_counts(workers: Workers) -> None:
    old, new = Generation(1), Generation(2)
    workers.beat(make_beat("a", generation=old, needed_step=9, composed_through=30))
    workers.beat(make_beat("b", generation=new, needed_step=7, composed_through=6))
    assert workers.needed_beyond(5, new) == 7
    assert workers.needed_beyond(7, new) is None
    assert workers.composed_through(new) == 6
    assert workers.composed_through(Generation(3)) == -1


def test_workers_are_settled_at_the_second_beat_after_they_heard_the_plans(
    workers: Workers,
) -> None:
    workers.told_plans("a")
    workers.beat(make_beat("a"))
    assert not workers.are_settled()
    workers.beat(make_beat("a"))
    assert workers.are_settled()
    workers.tells_no_more("a")
    assert not workers.are_settled()


def test_a_quarantine_counts_once_and_its_reason_is_bounded(workers: Workers) -> None:
    bad = Quarantine(domain="web", shard="a.tar", sample=3, reason="x" * 10_000)
    (kept,) = workers.quarantine([bad, bad])
    assert len(kept.reason) == 500
    assert workers.quarantine([bad]) == []
    assert workers.quarantines == (kept,)
    unknown = Quarantine(domain="wbe", shard="a.tar", sample=3, reason="")
    with pytest.raises(InvalidMessage, match="web, code, books"):
        workers.quarantine([unknown])


def test_a_worker_of_another_run_or_without_a_name_is_refused(workers: Workers) -> None:
    with pytest.raises(WrongRun, match="'large'"):
        workers.beat(make_beat("a", run_id="large"))
    with pytest.raises(InvalidMessage, match="worker_id"):
        workers.beat(make_beat(""))
    assert workers.statuses() == ()
