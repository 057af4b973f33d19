"""A checkpoint of four ranks goes on at any number of ranks, with the same global batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.report import examine
from tests.fakes_consumer import (
    ConsumedRun,
    Global,
    State,
    consumed_run,
    global_batches,
    write_corpus,
    write_run,
)
from trainer_client import merge_states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

NUM_STEPS = 34
CHECKPOINTS = (8, 16, 18)
"""Before a change of plan that is sealed already, and beside two others."""

FROM: dict[str, Callable[[list[State]], Callable[[int], State]]] = {
    "own": lambda states: lambda rank: states[rank % len(states)],
    "merged": lambda states: lambda rank: merge_states(states),
    "rank 0": lambda states: lambda rank: states[0],
}
"""What the ranks of a new generation take from the checkpoint."""


def _newest(run: ConsumedRun) -> Global:
    deliveries = run.deliveries()
    newest = max(one.generation for one in deliveries)
    return global_batches([one for one in deliveries if one.generation == newest])


@pytest.mark.fault_row(13, "another world size, with a constant global batch")
def test_a_checkpoint_of_4_ranks_goes_on_at_1_2_3_and_8_with_the_same_bytes(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    run_file = write_run(tmp_path / "out", write_corpus(tmp_path / "data"), steps=NUM_STEPS)
    with consumed_run(run_file, num_workers=2) as run:
        states = run.consume(4, until=NUM_STEPS, keep=CHECKPOINTS)
        whole = _newest(run)
        assert sorted(whole) == [(s, slot) for s in range(NUM_STEPS) for slot in range(20)]
        # A rank's state alone holds some of the lanes only; the ledger must have the others.
        assert {len(state["cursors"]) for state in states[8]} == {2}
        for number, world_size in enumerate((1, 2, 3, 8)):
            for shift, resume in enumerate(FROM.values()):
                first = CHECKPOINTS[(number + shift) % len(CHECKPOINTS)]
                run.consume(world_size, until=NUM_STEPS - 4, resume=resume(states[first]))
                resumed = {
                    key: row for key, row in whole.items() if first <= key[0] < NUM_STEPS - 4
                }
                assert _newest(run) == resumed, (world_size, first)
    findings = examine(tmp_path / "out")
    assert findings.clean
    assert findings.record.num_generations == 13
    record_injections(12, "4 ranks to 1, 2, 3 and 8, from three kinds of checkpoint")
    assert len(findings.record.plans) == 4
