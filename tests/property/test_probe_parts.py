"""The norms of sequences' gradients, as the probe measures them, against plain autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from protos.types import Generation, Rank, Step, StepReport
from tests.fakes_model import WIDTH, TinyModel, make_batches, summed_loss
from trainer_client import Batch, GradientProbe
from trainer_client.probe import ProbeStep
from trainer_client.reporter import PendingReport

NUM_DOMAINS = 3


def measure(
    model: nn.Module, batches: list[Batch], spec: ProbeSpec, *, loss_scale: float = 1.0
) -> ProbeStep:
    probe = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS)
    try:
        for batch in batches:
            probe.begin(batch)
            (summed_loss(model, batch) * loss_scale).backward()  # type: ignore[no-untyped-call]
        return probe.finish(batches[0].step, loss_scale=loss_scale)
    finally:
        probe.close()


def expected(model: nn.Module, batches: list[Batch], names: tuple[str, ...]) -> NDArray[np.float64]:
    """Return [domains]: each sequence's gradient by autograd alone, its squared norm, summed."""
    twin = TinyModel()
    twin.load_state_dict(model.state_dict())
    weights = [twin.get_submodule(name).weight for name in names]
    squares = np.zeros(NUM_DOMAINS)
    for batch in batches:
        for row, domain in enumerate(batch.domain_ids.tolist()):
            loss = summed_loss(twin, batch, torch.tensor([row]))
            found = torch.autograd.grad(loss, weights)  # type: ignore[arg-type]
            squares[domain] += sum(float(one.double().square().sum()) for one in found)
    return squares


mixes = st.lists(
    st.lists(st.integers(0, NUM_DOMAINS - 1), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(
    mix=mixes,
    checkpointing=st.sampled_from(["", "reentrant", "non-reentrant"]),
    loss_scale=st.sampled_from([1.0, 1 / 64, 1024.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=20, deadline=None)
def test_exact_norms_are_those_of_each_sequence_alone(
    mix: list[list[int]], checkpointing: str, loss_scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = TinyModel(checkpointing=checkpointing)
    batches = make_batches(mix, seed=seed)
    spec = ProbeSpec(mode="exact", part_norms=True)
    measured = measure(model, batches, spec, loss_scale=loss_scale)
    assert measured.part_squares is not None
    assert not measured.lacks_parts
    names = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS).layer_names
    found = measured.part_squares.wait()
    np.testing.assert_allclose(found, expected(model, batches, names), rtol=1e-4, atol=1e-9)


def test_sketched_norms_are_right_on_average() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    batches = make_batches([[0, 1, 2, 0], [1, 1]])
    found = []
    for seed in range(300):
        spec = ProbeSpec(sketch_rows=4, sketch_columns=4, seed=seed, part_norms=True)
        measured = measure(model, batches, spec)
        assert measured.part_squares is not None
        found.append(measured.part_squares.wait())
    names = GradientProbe(model, spec=ProbeSpec(), num_domains=NUM_DOMAINS).layer_names
    wanted = expected(model, batches, names)
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, axis=0) - wanted) < 4 * error).all()


def test_every_step_begins_anew_and_one_that_is_not_measured_has_none() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    spec = ProbeSpec(mode="exact", part_norms=True, every_n_steps=2)
    probe = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS)
    found = []
    for step in range(3):
        (batch,) = make_batches([[0, 1]], step=step)
        probe.begin(batch)
        summed_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        found.append(probe.finish(batch.step, loss_scale=1.0))
    probe.close()
    assert found[1].part_squares is None
    assert not found[1].lacks_parts
    assert found[0].part_squares is not None
    assert found[2].part_squares is not None
    np.testing.assert_array_equal(found[0].part_squares.wait(), found[2].part_squares.wait())


def test_without_the_wish_nothing_is_measured() -> None:
    measured = measure(TinyModel(), make_batches([[0, 1]]), ProbeSpec(mode="exact"))
    assert measured.part_squares is None
    assert not measured.lacks_parts


def resolved(measured: ProbeStep) -> tuple[StepReport, list[str]]:
    report = StepReport(
        generation=Generation(1),
        rank=Rank(0),
        step=Step(0),
        plan_version=1,
        sequences=np.array([2, 1, 0]),
        tokens=np.zeros(3, np.int64),
        loss_sum=np.zeros(3),
    )
    pending = PendingReport(report=report, losses=None, probe=replace(measured, norms=None))
    return pending.resolve(timeout_s=5)


def test_a_report_has_the_norms_and_how_many_sequences_they_are_of() -> None:
    spec = ProbeSpec(mode="exact", part_norms=True)
    measured = measure(TinyModel(), make_batches([[0, 1], [0]]), spec)
    report, left_out = resolved(measured)
    assert measured.part_squares is not None
    assert report.part_square_norms is not None
    assert report.part_square_norms.tolist() == measured.part_squares.wait().tolist()
    assert report.num_parts is not None
    assert report.num_parts.tolist() == [2, 1, 0]
    assert left_out == []


def test_sequences_that_hold_several_domains_are_left_out_with_a_word() -> None:
    (batch,) = make_batches([[0, 1]])
    mixed = replace(batch, domain_ids=torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]))
    measured = measure(TinyModel(), [mixed], ProbeSpec(mode="exact", part_norms=True))
    assert measured.alignment is not None
    report, left_out = resolved(measured)
    assert report.part_square_norms is None
    assert report.num_parts is None
    assert "cannot be told apart" in left_out[0]


def test_a_tied_layer_is_refused() -> None:
    model = TinyModel()
    model.head = nn.Linear(WIDTH, 17)
    model.head.weight = model.embedding.weight
    spec = ProbeSpec(mode="exact", layers=("head",), part_norms=True)
    with pytest.raises(ConfigError, match="head shares its weight with embedding"):
        GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS)
