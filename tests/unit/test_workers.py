"""Loader workers as the controller sees them."""

from __future__ import annotations

import pytest

from controller.lanes import SETTLE_S
from controller.workers import ABSENCE_S, Workers
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
    assert _lanes(workers) == ["a", "b", "b", "c"]


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
    assert _lanes(workers) == ["b"] * 4
    clock.now_s += SETTLE_S
    assert workers.expire() == []
    assert _lanes(workers) == ["b", "b", "a", "a"]


def test_a_worker_says_for_how_long_it_has_not_been_heard(workers: Workers, clock: Clock) -> None:
    workers.beat(make_beat("a"))
    clock.now_s += 4
    workers.beat(make_beat("b"))
    hung, heard = workers.statuses()
    assert (hung.silent_s, hung.is_silent) == (4, True)
    assert (heard.silent_s, heard.is_silent) == (0, False)
    clock.now_s += 7
    workers.expire()
    lost = workers.statuses()[0]
    assert (lost.alive, lost.silent_s, lost.is_silent) == (False, 11, False)


def test_a_worker_that_is_away_for_a_moment_keeps_its_lanes(workers: Workers, clock: Clock) -> None:
    workers.beat(make_beat("a"))
    workers.beat(make_beat("b"))
    before, version = _lanes(workers), workers.lanes_version
    for _ in range(5):
        assert not workers.stream_ended("a")
        clock.now_s += ABSENCE_S / 2
        assert workers.expire() == []
        assert not workers.beat(make_beat("a"))
        assert not workers.beat(make_beat("b"))
    assert (_lanes(workers), workers.lanes_version) == (before, version)
    assert workers.num_lanes_moved == 0


def test_a_worker_that_stays_away_is_lost(workers: Workers, clock: Clock) -> None:
    workers.beat(make_beat("a"))
    workers.beat(make_beat("b"))
    assert _lanes(workers) == ["a", "a", "b", "b"]
    workers.stream_ended("a")
    clock.now_s += ABSENCE_S + 0.1
    assert workers.expire() == ["a"]
    assert _lanes(workers) == ["b"] * 4
    (event,) = workers.take_events()
    assert event.body == {"event": "lanes moved", "lanes": 2, "after": {"b": 4}}
    assert workers.take_events() == []


def test_a_rank_that_misses_an_absent_worker_has_its_lanes_moved_at_once(
    workers: Workers, clock: Clock
) -> None:
    workers.beat(make_beat("a", endpoint="127.0.0.1:1"))
    workers.beat(make_beat("b", endpoint="127.0.0.1:2"))
    assert _lanes(workers) == ["a", "a", "b", "b"]
    # The controller hears this one: the rank may try again.
    assert workers.unreachable("127.0.0.1:1") == []
    workers.stream_ended("a")
    assert workers.unreachable("127.0.0.1:2") == []
    assert workers.unreachable("127.0.0.1:1") == ["a"]
    assert _lanes(workers) == ["b"] * 4


def test_a_leaving_worker_gives_its_lanes_away_at_once_and_is_not_missed(
    workers: Workers, clock: Clock
) -> None:
    workers.beat(make_beat("a"))
    workers.beat(make_beat("b"))
    assert _lanes(workers) == ["a", "a", "b", "b"]
    assert not workers.beat(make_beat("a", leaving=True))
    assert _lanes(workers) == ["b"] * 4
    assert workers.stream_ended("a")
    clock.now_s += 100
    workers.beat(make_beat("b"))
    assert workers.expire() == []
    assert [(each.worker_id, each.alive) for each in workers.statuses()] == [
        ("a", False),
        ("b", True),
    ]


def test_the_last_worker_serves_until_it_is_gone(workers: Workers) -> None:
    workers.beat(make_beat("a"))
    assert _lanes(workers) == ["a"] * 4
    workers.beat(make_beat("a", leaving=True))
    assert _lanes(workers) == ["a"] * 4
    workers.beat(make_beat("b"))
    assert _lanes(workers) == ["b"] * 4


def test_a_worker_started_again_is_found_at_its_new_address(workers: Workers) -> None:
    workers.beat(make_beat("a", pid=1, endpoint="127.0.0.1:1"))
    assert workers.endpoints()
    version = workers.lanes_version
    assert workers.beat(make_beat("a", pid=2, endpoint="127.0.0.1:2"))
    assert workers.lanes_version > version
    assert {each.endpoint for each in workers.endpoints()} == {"127.0.0.1:2"}
    assert workers.num_lanes_moved == 0


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


def test_one_beat_settles_a_worker_that_names_the_controller_whose_plans_it_has(
    workers: Workers,
) -> None:
    workers.epoch = 7
    workers.beat(make_beat("a", heard_epoch=6))
    workers.told_plans("a")
    assert not workers.are_settled()
    workers.beat(make_beat("a", heard_epoch=7))
    assert workers.are_settled()
    # What it says of this controller may be from before it was told all plans anew.
    workers.forget_told()
    workers.beat(make_beat("a", heard_epoch=7))
    assert not workers.are_settled()
    workers.told_plans("a")
    for _ in range(2):
        workers.beat(make_beat("a", heard_epoch=7))
    assert workers.are_settled()


def test_workers_of_before_a_restart_are_waited_for_but_not_for_long(
    workers: Workers, clock: Clock
) -> None:
    workers.epoch = 7
    workers.expect({"a", "b"})
    workers.beat(make_beat("a", heard_epoch=7))
    assert not workers.are_settled()
    clock.now_s += ABSENCE_S + 0.1
    assert workers.are_settled()
    workers.expect({"a", "b"})
    assert not workers.are_settled()
    for name in ("a", "b"):
        workers.beat(make_beat(name, heard_epoch=7))
    assert workers.are_settled()
