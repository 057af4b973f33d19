"""The probe against plain autograd: exact mode is exact, sketches are unbiased, parts add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from tests.fakes_model import TinyModel, domain_gradients, make_batches, summed_loss
from trainer_client import Batch, GradientProbe

NUM_DOMAINS = 4


@contextmanager
def watching(model: nn.Module, spec: ProbeSpec) -> Iterator[GradientProbe]:
    probe = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS)
    try:
        yield probe
    finally:
        probe.close()


def measure(
    probe: GradientProbe, model: nn.Module, batches: list[Batch], *, loss_scale: float = 1.0
) -> NDArray[np.float64]:
    """Train a step as a trainer would; return the alignment that the probe saw."""
    for batch in batches:
        probe.begin(batch)
        (summed_loss(model, batch) * loss_scale).backward()  # type: ignore[no-untyped-call]
    measured = probe.finish(batches[0].step, loss_scale=loss_scale)
    assert measured.alignment is not None
    return measured.alignment.wait(timeout_s=5)


def expected_alignment(
    probe: GradientProbe, model: nn.Module, batches: list[Batch]
) -> NDArray[np.float64]:
    """Return the same by autograd, on a twin without hooks or checkpointing."""
    twin = TinyModel(num_blocks=len(model.blocks))  # type: ignore[arg-type]
    twin.load_state_dict(model.state_dict())
    weights = [twin.get_submodule(name).weight for name in probe.layer_names]
    rows = domain_gradients(twin, batches, weights, NUM_DOMAINS).double()  # type: ignore[arg-type]
    return (rows @ rows.T).numpy()


mixes = st.lists(
    st.lists(st.integers(0, NUM_DOMAINS - 1), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(
    mix=mixes,
    checkpointing=st.sampled_from(["", "reentrant", "non-reentrant"]),
    loss_scale=st.sampled_from([1.0, 1 / 64, 1024.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_exact_mode_gives_autograds_inner_products_however_the_domains_are_mixed(
    mix: list[list[int]], checkpointing: str, loss_scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = TinyModel(checkpointing=checkpointing)
    batches = make_batches(mix, seed=seed)
    with watching(model, ProbeSpec(mode="exact")) as probe:
        found = measure(probe, model, batches, loss_scale=loss_scale)
        expected = expected_alignment(probe, model, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_flattened_hidden_states_are_told_apart_by_sequence() -> None:
    torch.manual_seed(0)
    model = TinyModel(flat_head=True)
    batches = make_batches([[0, 3, 1], [2, 2]])
    with watching(model, ProbeSpec(mode="exact", layers=("head",))) as probe:
        found = measure(probe, model, batches)
        expected = expected_alignment(probe, model, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@given(mix=mixes, checkpointing=st.sampled_from(["", "reentrant", "non-reentrant"]))
@settings(max_examples=10, deadline=None)
def test_a_sketch_does_not_depend_on_micro_batches_or_checkpointing(
    mix: list[list[int]], checkpointing: str
) -> None:
    spec = ProbeSpec(sketch_rows=5, sketch_columns=3)
    torch.manual_seed(0)
    plain, other = TinyModel(), TinyModel(checkpointing=checkpointing)
    other.load_state_dict(plain.state_dict())
    batches = make_batches(mix)
    joined = make_batches([[0]])[0]
    whole = Batch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        loss_mask=torch.cat([batch.loss_mask for batch in batches]),
        domain_ids=torch.cat([batch.domain_ids for batch in batches]),
        step=joined.step,
        slots=joined.slots,
        first_of_step=True,
        last_of_step=True,
        plan_version=0,
        degraded=False,
    )
    with watching(plain, spec) as first, watching(other, spec) as second:
        one, many = measure(first, plain, [whole]), measure(second, other, batches)
    np.testing.assert_allclose(one, many, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_the_estimate_is_unbiased_over_seeds(seed: int) -> None:
    torch.manual_seed(seed)
    model = TinyModel(num_blocks=1)
    mix = [[0, 1, 2, 3], [0, 0, 1, 3]]
    estimates = []
    for step in range(400):  # a step draws its own projections
        batches = make_batches(mix, seed=seed, step=step)
        if step == 0:
            spec = ProbeSpec(sketch_rows=6, sketch_columns=4, num_layers=1, seed=seed)
            probe = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS, norms=False)
            expected = expected_alignment(probe, model, batches)
        estimates.append(measure(probe, model, batches))
    probe.close()
    stacked = np.stack(estimates)
    error = stacked.std(axis=0, ddof=1) / np.sqrt(len(stacked))
    # Sixteen entries and five examples: five standard errors are next to never passed by chance.
    assert (np.abs(stacked.mean(axis=0) - expected) < 5 * error).all()


def test_a_sketch_as_large_as_the_layer_is_exact() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    batches = make_batches([[0, 1, 2, 3], [2, 0]])
    with watching(model, ProbeSpec(sketch_rows=12, sketch_columns=30)) as probe:
        found = measure(probe, model, batches)
        expected = expected_alignment(probe, model, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_model_that_only_evaluates_is_not_measured() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    batches = make_batches([[0, 1, 2, 3]])
    with watching(model, ProbeSpec(mode="exact")) as probe:
        probe.begin(batches[0])
        with torch.no_grad():
            model(torch.zeros(3, 6, dtype=torch.long))
        found = measure(probe, model, batches)
        expected = expected_alignment(probe, model, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_only_every_nth_step_is_measured_and_norms_always() -> None:
    model = TinyModel()
    with watching(model, ProbeSpec(every_n_steps=3)) as probe:
        measured = []
        for step in range(5):
            for batch in make_batches([[0, 1]], step=step):
                probe.begin(batch)
                summed_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            found = probe.finish(batch.step, loss_scale=1.0)
            measured.append(found.alignment is not None)
            assert found.norms is not None
    assert measured == [True, False, False, True, False]


def test_hidden_states_of_another_shape_are_refused_with_the_layer() -> None:
    model = TinyModel()
    with watching(model, ProbeSpec(mode="exact")) as probe:
        probe.begin(make_batches([[0, 1, 2]])[0])
        with pytest.raises(ConfigError, match=r"layer blocks.0.down .* 3 sequences.*\(2, 6, 12\)"):
            model(torch.zeros(2, 6, dtype=torch.long))


def test_a_closed_probe_leaves_the_model_as_it_was() -> None:
    model = TinyModel()
    with watching(model, ProbeSpec()) as probe:
        probe.begin(make_batches([[0, 1]])[0])
    assert all(not module._forward_hooks for module in model.modules())
    model(torch.zeros(7, 3, dtype=torch.long))


def test_several_ranks_without_torch_distributed_are_refused() -> None:
    with pytest.raises(ConfigError, match="call init_process_group"):
        GradientProbe(TinyModel(), spec=ProbeSpec(), num_domains=2, world_size=2)


def test_where_only_norms_are_asked_for_nothing_is_watched_or_added_up_over_ranks() -> None:
    model = TinyModel()
    # Without torch.distributed two ranks could not add sketches up.
    probe = GradientProbe(model, spec=ProbeSpec(mode="norms"), num_domains=2, world_size=2)
    assert probe.layer_names == ()
    assert all(not module._forward_hooks for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_batches([[0, 1]]):
        probe.begin(batch)
        summed_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found = probe.finish(batch.step, loss_scale=1.0)
        assert found.alignment is None
        assert found.norms is not None
        weights, updates = found.norms.wait()
        assert (weights > 0).all()
        assert (updates > 0).all()
