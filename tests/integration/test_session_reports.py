"""What a session says of the steps that it has trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from protos.spec import ValidationSpec
from tests.fakes_trainer import (
    FakeRun,
    cursor_before,
    domain_of,
    make_spec,
    num_tokens_of,
    sequence,
)
from tests.sessions import check_by_the_book, connect, every_slot, train
from trainer_client.reporter import CAPACITY, MOST_IN_A_CALL


@pytest.fixture
def run() -> Iterator[FakeRun]:
    with FakeRun(make_spec()).serving() as started:
        yield started


def test_ending_a_step_too_early_or_not_at_all_is_refused(run: FakeRun) -> None:
    with connect(run) as session:
        batches = session.batches(micro_batch=6)
        with pytest.raises(ValueError, match="before the last micro-batch of step 0"):
            session.end_step()
        next(batches)
        with pytest.raises(ValueError, match="before the last micro-batch of step 0"):
            session.end_step()
        next(batches)
        with pytest.raises(ValueError, match="was not called .* step 0"):
            next(batches)
        again = session.batches(micro_batch=12)
        assert check_by_the_book(run, [next(again)]) == every_slot(run)[:12]
        session.end_step()
        assert next(again).step == 1


def test_reports_say_what_was_delivered_and_what_it_cost(run: FakeRun) -> None:
    torch.manual_seed(0)
    with connect(run, rank=1, world_size=2) as session:
        expected = np.zeros(3)
        for batch in session.batches(micro_batch=4):
            logits = torch.randn(*batch.tokens.shape, 50_000)
            loss = session.loss(logits, batch)
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch.labels, reduction="none"
            )
            kept = losses * batch.loss_mask
            torch.testing.assert_close(loss, kept.sum() * 2 / (12 * 5))
            for row, domain in enumerate(batch.domain_ids.tolist()):
                expected[domain] += kept[row].sum().item()
            if batch.last_of_step:
                session.end_step()
                break
        assert session._reporter.flush(timeout_s=10)
        assert session.reports_sent == 1
    (report,) = run.controller.reports
    assert (report.generation, report.rank, report.step) == (1, 1, 0)
    slots = range(6, 12)
    for domain in range(3):
        mine = [slot for slot in slots if domain_of(run.spec, 0, slot) == domain]
        assert report.sequences[domain] == len(mine)
        assert report.tokens[domain] == sum(num_tokens_of(run.spec, 0, s) - 1 for s in mine)
    np.testing.assert_allclose(report.loss_sum, expected, rtol=1e-5)
    assert sorted(report.cursors) == [2, 3]
    np.testing.assert_array_equal(report.cursors[2], cursor_before(run.spec, 2, 1))  # type: ignore[index]
    assert report.step_s > 0


def test_reports_carry_what_some_policies_need() -> None:
    spec = dataclasses.replace(
        make_spec(), validation=(ValidationSpec(every=1, period=2, span=1),), needs_reference=True
    )
    with FakeRun(spec).serving() as run, connect(run) as session:
        expected = np.zeros((3, 3))
        evaluation = {"domain-2": 1.0, "domain-0": 3.0, "domain-1": 2.0}
        for batch in session.batches(micro_batch=4):
            losses = torch.rand(batch.labels.shape) * batch.loss_mask
            # Padding counts nowhere, whatever the reference says of it.
            reference = torch.rand(batch.labels.shape) - 2.0 * ~batch.loss_mask
            if batch.step < 2 or batch.first_of_step:
                session.record_losses(losses, batch, reference=reference)
            else:
                session.record_losses(losses, batch)
            if batch.step < 2:
                excess = (losses - reference).clamp_min(0) * batch.loss_mask
                for row, domain in enumerate(batch.domain_ids.tolist()):
                    expected[batch.step, domain] += excess[row].sum().item()
            if batch.last_of_step:
                if session.validation_due(batch.step):
                    session.record_validation(evaluation)
                session.end_step()
                if batch.step == 2:
                    break
        assert session._reporter.flush(timeout_s=10)
    first, second, third = run.controller.reports
    np.testing.assert_allclose(first.excess_sum, expected[0], rtol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(second.excess_sum, expected[1], rtol=1e-5)  # type: ignore[arg-type]
    assert first.validation_loss is not None
    assert first.validation_loss.tolist() == [3.0, 2.0, 1.0]
    assert second.validation_loss is None
    # Not all of its micro-batches had a reference.
    assert third.excess_sum is None
    assert third.validation_loss is not None


def test_an_evaluation_that_is_none_is_refused(run: FakeRun) -> None:
    with connect(run) as session:
        with pytest.raises(ValueError, match="a loss of each of the run's domains"):
            session.record_validation({"domain-0": 1.0})
        with pytest.raises(ValueError, match="finite and not negative"):
            session.record_validation({f"domain-{index}": float("nan") for index in range(3)})


def test_training_goes_on_when_the_controller_hangs_and_lost_reports_are_counted() -> None:
    with FakeRun(make_spec(num_steps=CAPACITY + 200)).serving() as run:
        run.controller.hang_reports = True
        with connect(run) as session:
            assert len(train(session, micro_batch=12)) == CAPACITY + 200
            assert session.reports_sent == 0
            # Others wait, or are in the call that hangs.
            assert session.reports_dropped >= 200 - MOST_IN_A_CALL
            session._reporter.close(timeout_s=0.0)
        assert session.reports_dropped >= CAPACITY + 200 - MOST_IN_A_CALL


def test_the_delivery_log_has_a_line_for_each_sequence_and_survives_a_torn_one(
    run: FakeRun, tmp_path: Path
) -> None:
    with connect(run, rank=1, world_size=2, delivery_log=tmp_path) as session:
        train(session, until=2)
    path = tmp_path / "received.rank1.jsonl"
    with path.open("ab") as file:
        file.write(b'{"generation": 1, "st')
    run.controller.generation = 2
    with connect(run, rank=1, world_size=2, delivery_log=tmp_path) as session:
        train(session, until=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["generation"], line["step"], line["slot"]) for line in lines] == [
        (generation, step, slot)
        for generation, step in [(1, 0), (1, 1), (2, 0)]
        for slot in range(6, 12)
    ]
    assert lines[7] == {
        "generation": 1,
        "step": 1,
        "slot": 7,
        "lane": 2,
        "domain": domain_of(run.spec, 1, 7),
        "epoch": 0,
        "window": 1,
        "sequence": 7,
        "num_tokens": num_tokens_of(run.spec, 1, 7),
        "sha256": hashlib.sha256(sequence(run.spec, 1, 7).astype("<u2").tobytes()).hexdigest(),
    }
