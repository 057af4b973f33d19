"""`headrace scale` says what happens to workers and lanes, and when it has happened."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.scaling import changes, has_happened, scale_to
from protos.client import AdminClient
from protos.errors import NotReady
from protos.status import RunStatus, WorkerStatus
from tests.fakes_services import ScriptedController, serving
from tests.property.test_codec import STATUS


def _worker(name: str, *lanes: int, **changed: bool) -> WorkerStatus:
    worker = WorkerStatus(
        worker_id=name,
        endpoint=f"{name}:1",
        alive=True,
        lanes=lanes,
        cache_bytes=0,
        stall_s=0.0,
        sequences_served=0,
        managed=True,
    )
    return replace(worker, **changed)  # type: ignore[arg-type]  # a bag of flags


def _status(*workers: WorkerStatus, moved: int = 0) -> RunStatus:
    return replace(STATUS, workers=workers, lanes_moved=moved)


def test_it_has_happened_when_so_many_serve_evenly_and_nobody_is_leaving() -> None:
    both = _status(_worker("a", 0, 1), _worker("b", 2, 3))
    assert has_happened(both, 2, is_still=False)
    assert not has_happened(both, 1, is_still=True)
    assert not has_happened(_status(_worker("a", 0, 1, 2, 3), _worker("b")), 2, is_still=False)
    # One that takes few lanes leaves them uneven for good.
    assert has_happened(_status(_worker("a", 0, 1, 2, 3), _worker("b")), 2, is_still=True)
    leaving = _status(_worker("a", 0, 1, 2, 3), _worker("b", leaving=True))
    assert not has_happened(leaving, 1, is_still=True)
    gone = _status(_worker("a", 0, 1, 2, 3), _worker("b", leaving=True, alive=False))
    assert has_happened(gone, 1, is_still=False)
    by_hand = _status(_worker("a", 0, 1), _worker("x", 2, 3, managed=False))
    assert has_happened(by_hand, 1, is_still=False)
    assert not has_happened(_status(_worker("a")), 1, is_still=True), "nobody serves a lane"


def test_what_changed_is_said_once() -> None:
    before = _status(_worker("a", 0, 1, 2), _worker("b", 3))
    after = _status(_worker("a", 0, 1), _worker("b", leaving=True), _worker("c", 2, 3), moved=2)
    assert list(changes(before, after)) == [
        "c serves at c:1",
        "b is leaving",
        "2 lanes moved: a 2, c 2",
    ]
    assert list(changes(after, after)) == []
    gone = _status(_worker("a", 0, 1), _worker("b", leaving=True, alive=False), _worker("c", 2, 3))
    assert list(changes(after, replace(gone, lanes_moved=2))) == ["b has ended"]


def test_a_wish_that_nobody_obeys_is_told_with_what_is_there() -> None:
    controller = ScriptedController()
    with serving(controller) as address:
        admin = AdminClient(address)
        with pytest.raises(NotReady, match=r"3 loader workers are wanted, 0 serve after 0\.5 s"):
            scale_to(admin, 3, timeout_s=0.5, say=lambda line: None)
        admin.close()
    assert controller.wanted_workers == 3
