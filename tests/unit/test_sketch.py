"""How projections are drawn: unbiased, by their key alone, exact where they are large enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.spec import DRAWS, PROJECTIONS, ProbeSpec
from protos.types import Step
from trainer_client.sketch import LayerSketch, draw_projection
from trainer_client.watch import domain_sums


def drawn(kind: str, size: int, sketch_size: int, *key: int) -> torch.Tensor:
    buffer = torch.full((size, sketch_size), torch.nan)
    draw_projection(buffer, kind, *key)
    return buffer


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_the_mean_of_a_projection_times_its_transpose_is_the_identity(kind: str) -> None:
    products = torch.stack(
        [one @ one.T for one in (drawn(kind, 10, 4, key) for key in range(2000))]
    ).double()
    error = products.std(dim=0) / len(products) ** 0.5
    # A hundred entries of each kind: five standard errors are next to never passed by chance.
    distance = (products.mean(dim=0) - torch.eye(10)).abs()
    assert bool((distance <= 5 * error + 1e-6).all())


@given(
    kind=st.sampled_from(PROJECTIONS),
    size=st.integers(1, 40),
    extra=st.integers(0, 10),
    key=st.integers(0, 10),
)
@settings(max_examples=40, deadline=None)
def test_a_projection_as_large_as_the_layer_changes_no_inner_product(
    kind: str, size: int, extra: int, key: int
) -> None:
    one = drawn(kind, size, size + extra, key)
    torch.testing.assert_close(one @ one.T, torch.eye(size))


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_draw_depends_on_its_key_alone(kind: str) -> None:
    torch.manual_seed(1)
    first = drawn(kind, 33, 7, 5, 2)
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, drawn(kind, 33, 7, 5, 2))
    assert not torch.equal(first, drawn(kind, 33, 7, 5, 3))
    assert not torch.equal(first, drawn(kind, 33, 7, 52))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_projections_are_drawn_for_a_step_or_for_the_run(kind: str, draw: str) -> None:
    def make() -> LayerSketch:
        return LayerSketch(
            spec=ProbeSpec(projection=kind, draw=draw, sketch_rows=3, sketch_columns=2),
            num_domains=2,
            layer_index=1,
            in_features=9,
            out_features=8,
            device=torch.device("cpu"),
        )

    def at(sketch: LayerSketch, step: int) -> torch.Tensor:
        sketch.begin(Step(step))
        assert sketch.out_projection is not None
        return sketch.out_projection.clone()

    sketch, late = make(), make()
    first, second = at(sketch, 0), at(sketch, 1)
    assert torch.equal(first, second) == (draw == "run")
    # A rank that comes later draws what the others have.
    assert torch.equal(at(late, 1), second)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_sums_by_token_are_those_by_sequence_where_a_sequence_has_one_domain(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    sequences, tokens, p, q = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sequences, tokens, p, generator=generator)
    columns = torch.randn(sequences, tokens, q, generator=generator)
    ids = torch.randint(3, (sequences,), generator=generator)
    by_sequence = domain_sums(rows, columns, ids, 3)
    by_token = domain_sums(rows, columns, ids[:, None].expand(-1, tokens), 3)
    torch.testing.assert_close(by_sequence, by_token, rtol=1e-4, atol=1e-5)
    expected = np.zeros((3, p, q))
    for sequence, domain in enumerate(ids.tolist()):
        expected[domain] += (rows[sequence].double().T @ columns[sequence].double()).numpy()
    np.testing.assert_allclose(by_sequence.numpy(), expected, rtol=1e-4, atol=1e-5)
