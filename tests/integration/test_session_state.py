"""What a session saves, and where it goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import trainer_client
from protos.errors import (
    ConfigError,
    Disagreement,
)
from tests.fakes_trainer import (
    FakeRun,
    cursor_before,
    make_spec,
)
from tests.sessions import check_by_the_book, connect, every_slot, train


@pytest.fixture
def run() -> Iterator[FakeRun]:
    with FakeRun(make_spec()).serving() as started:
        yield started


def test_a_state_resumes_with_the_next_step_on_another_number_of_ranks(run: FakeRun) -> None:
    states = []
    seen: list[tuple[int, int]] = []
    for rank in range(3):
        with connect(run, rank=rank, world_size=3) as session:
            batches = session.batches(micro_batch=12)
            for _ in range(2):
                seen += check_by_the_book(run, [next(batches)])
                session.end_step()
            next(batches)  # taken, not trained: no part of the state
            states.append(json.loads(json.dumps(session.state_dict())))
    assert states[0]["step"] == 2
    state = trainer_client.merge_states(states)
    assert sorted(state["cursors"]) == ["0", "1", "2", "3"]
    assert state["cursors"]["3"] == cursor_before(run.spec, 3, 2).tolist()
    for rank in range(2):
        with connect(run, rank=rank, world_size=2, resume=state) as session:
            assert session.first_step == 2
            assert {**session.state_dict(), "world_size": 3}["step"] == 2
            seen += check_by_the_book(run, train(session))
    assert sorted(seen) == every_slot(run)


def test_a_state_can_be_loaded_after_connecting(run: FakeRun) -> None:
    with connect(run) as session:
        train(session, until=2)
        state = session.state_dict()
    with connect(run) as session:
        session.load_state_dict(state)
        assert session.first_step == 2
        assert session.state_dict() == state
        assert check_by_the_book(run, train(session)) == every_slot(run, 2)
        with pytest.raises(ValueError, match="after batches"):
            session.load_state_dict(state)


def test_a_cursor_of_an_earlier_step_is_passed_on_and_kept_out_of_the_state(run: FakeRun) -> None:
    run.controller.first_step, run.controller.cursor_step = 3, 1
    with connect(run) as session:
        assert session.state_dict()["cursors"] == {}
        assert check_by_the_book(run, train(session)) == every_slot(run, 3)
    assert set(run.workers[0].openings[0].cursor_steps.values()) == {1}


def test_a_state_of_another_order_is_refused(run: FakeRun) -> None:
    with connect(run) as session:
        state = {**session.state_dict(), "order_sha256": "of another seed"}
    with pytest.raises(Disagreement, match="another order"):
        connect(run, resume=state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 7}, "version 7"),
        ({"cursors": {"a": 1}}, "damaged"),
        ({"cursors": [1]}, "damaged"),
    ],
)
def test_a_damaged_state_is_told_in_a_sentence(
    run: FakeRun, change: dict[str, Any], sentence: str
) -> None:
    with connect(run) as session:
        state = session.state_dict()
    with pytest.raises(ConfigError, match=sentence):
        connect(run, resume={**state, **change})
    with pytest.raises(ConfigError, match="lacks step"):
        connect(run, resume={name: value for name, value in state.items() if name != "step"})
