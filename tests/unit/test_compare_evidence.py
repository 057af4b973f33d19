"""The evidence that is kept says what its tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.compare.record import read_records
from deploy.compare.spec import load_spec
from tests.learning import ablations
from tests.learning.evidence_table import EVIDENCE, TABLE, comparisons, folders, rendered


@pytest.mark.parametrize("folder", comparisons(), ids=lambda folder: folder.name)
def test_the_table_is_what_the_records_come_to(folder: Path) -> None:
    assert rendered(folder) == (folder / TABLE).read_text()


def test_the_table_of_ablations_is_what_their_records_come_to() -> None:
    assert ablations.ablation_table(EVIDENCE) == (EVIDENCE / ablations.TABLE).read_text()


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_the_trials_are_of_one_comparison(folder: Path) -> None:
    spec, records = load_spec(folder / "compare.yaml"), read_records(folder)
    assert records
    assert {record.arm for record in records} <= spec.arms.keys()
    assert {record.steps for record in records} == {spec.steps}
    assert all(record.policy == spec.arms[record.arm].policy for record in records)
    # All arms of a seed and model began with the same weights.
    for seed in spec.seeds:
        for model in {record.model for record in records}:
            first = {
                tuple(record.evaluations[0].test_loss)
                for record in records
                if (record.seed, record.model) == (seed, model)
            }
            assert len(first) <= 1
