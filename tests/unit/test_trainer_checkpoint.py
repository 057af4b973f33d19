"""States of several ranks become one, unless they are of different checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from protos.errors import ConfigError
from protos.types import Lane, Step
from trainer_client.checkpoint import merge_states, pack_state, unpack_state


def state(*lanes: int, step: int = 4, sequence: int = 0) -> dict[str, Any]:
    return pack_state(
        run_id="run",
        order_sha256="order",
        step=Step(step),
        world_size=2,
        cursors={Lane(lane): np.full((2, 3), sequence, np.uint32) for lane in lanes},
    )


def test_a_state_comes_back_as_what_join_carries() -> None:
    resume = unpack_state(state(2, 11, sequence=7))
    assert (resume.order_sha256, resume.step) == ("order", 4)
    assert sorted(resume.cursors) == [2, 11]
    np.testing.assert_array_equal(resume.cursors[Lane(11)], np.full((2, 3), 7))


def test_merging_keeps_every_lane_once_in_order() -> None:
    merged = merge_states([state(1, 2), state(2, 10), state(0)])
    assert list(merged["cursors"]) == ["0", "1", "2", "10"]
    assert unpack_state(merged).step == 4


def test_merging_keeps_the_newest_head_of_the_ledger_and_states_of_before_there_was_one() -> None:
    states = [
        {**state(lane), "ledger_head": f"{row}:{'a' * 64}"} for lane, row in enumerate((9, 10))
    ]
    old = state(2)
    assert merge_states([*states, old])["ledger_head"] == f"10:{'a' * 64}"
    assert "ledger_head" not in {**old, **merge_states([old])}
    assert unpack_state(old).step == 4


@pytest.mark.fault_row(14, "states of two checkpoints, mixed")
@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (state(3, step=5), "step is 4 in one and 5 in another"),
        (state(1, sequence=9), "two ranks place lane 1 differently at step 4"),
        ({**state(3), "run_id": "x"}, "run_id is 'run' in one and 'x' in another"),
    ],
)
def test_states_of_different_checkpoints_are_refused(
    other: dict[str, Any], sentence: str, record_injections: Callable[..., None]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        merge_states([state(0, 1), other])
    record_injections(1)


def test_no_state_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="the state of every rank, got none"):
        merge_states([])
