"""The probe in a model that is compiled, checkpointed, in half precision, tied, or mixed by token.

Every alignment is held against autograd on a plain twin.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from tests.fakes_model import TinyModel, domain_gradients, make_batches, summed_loss
from trainer_client import Batch, GradientProbe
from trainer_client.loss import DomainLosses

# torch's own, from within its compiler.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NUM_DOMAINS = 4
MIX = [[0, 1, 2], [3, 0, 0], [2, 1, 3]]
WHOLE = ProbeSpec(sketch_rows=24, sketch_columns=24)
"""As large as the layers, so that the sketch is exact."""


@contextlib.contextmanager
def watching(model: nn.Module, spec: ProbeSpec = WHOLE) -> Iterator[GradientProbe]:
    probe = GradientProbe(model, spec=spec, num_domains=NUM_DOMAINS, norms=False)
    try:
        yield probe
    finally:
        probe.close()


def measure(
    probe: GradientProbe, model: nn.Module, batches: list[Batch], *, half: bool = False
) -> NDArray[np.float64]:
    """Train a step; return the alignment."""
    for batch in batches:
        probe.begin(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = summed_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    measured = probe.finish(batches[0].step, loss_scale=1.0)
    assert measured.alignment is not None
    return measured.alignment.wait(timeout_s=5)


def expected(probe: GradientProbe, model: TinyModel, batches: list[Batch]) -> NDArray[np.float64]:
    """Return the same by autograd, on a twin that nothing watches."""
    twin = TinyModel(num_blocks=len(model.blocks))
    if model.head.weight is model.embedding.weight:
        twin.head.weight = twin.embedding.weight
    twin.load_state_dict(model.state_dict())
    weights = [twin.get_submodule(name).weight for name in probe.layer_names]
    rows = domain_gradients(twin, batches, weights, NUM_DOMAINS).double()  # type: ignore[arg-type]
    return (rows @ rows.T).numpy()


def assert_close(found: Any, wanted: NDArray[np.float64], part: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=part * np.abs(wanted).max())


def _train(model: nn.Module, probe: GradientProbe | None, num_steps: int) -> list[Any]:
    """Train some steps with an evaluation between; return the alignments."""
    found = []
    for step in range(num_steps):
        batches = make_batches(MIX, seed=step, step=step)
        if probe is not None:
            found.append(measure(probe, model, batches))
        else:
            for batch in batches:
                summed_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            model(batches[0].tokens)
    return found


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.timeout(240)
@compiles
def test_a_compiled_model_has_no_more_graphs_breaks_or_recompiles(backend: str) -> None:
    counted = {}
    for watched in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = TinyModel()
        with watching(model) if watched else contextlib.nullcontext() as probe:
            compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
            found = _train(compiled, probe, 3)
            counted[watched] = (
                counters["stats"]["unique_graphs"],
                dict(counters["graph_break"]),
            )
            if probe is not None:
                for step, one in enumerate(found):
                    batches = make_batches(MIX, seed=step, step=step)
                    assert_close(one, expected(probe, model, batches))
    torch._dynamo.reset()
    assert counted[True] == counted[False] == (2, {})  # one to train, one to evaluate


@compiles
def test_sampled_steps_cost_a_compiled_model_one_more_graph_and_no_more() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = TinyModel()
    with watching(model, dataclasses.replace(WHOLE, every_n_steps=2)) as probe:
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(6):
            for batch in make_batches(MIX, seed=step, step=step):
                probe.begin(batch)
                summed_loss(compiled, batch).backward()  # type: ignore[no-untyped-call]
            measured = probe.finish(batch.step, loss_scale=1.0)
            assert (measured.alignment is not None) == (step % 2 == 0)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_may_go_on_in_place_on_what_a_watched_layer_gives(compiled: bool) -> None:
    class InPlace(TinyModel):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(tokens)
            for block in self.blocks:
                steps = torch.arange(1, hidden.shape[1] + 1)
                mixed = block.up(hidden.cumsum(dim=1) / steps[None, :, None])  # type: ignore[operator]
                added = block.down(mixed.tanh_())  # type: ignore[operator]
                added += hidden
                hidden = added
            return self.head(hidden)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, batches = InPlace(), make_batches(MIX)
    with watching(model, dataclasses.replace(WHOLE, layers=("blocks.*",))) as probe:
        trained: Any = model
        if compiled:
            trained = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(measure(probe, trained, batches), expected(probe, model, batches))
    torch._dynamo.reset()


def _selective(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    def keep_products(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        keep = op in products
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    done: torch.Tensor = checkpoint(block, hidden, use_reentrant=False, context_fn=contexts)
    return done


class _Selective(TinyModel):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = _selective(block, hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


def test_selective_checkpointing_counts_every_token_once() -> None:
    torch.manual_seed(0)
    model, batches = _Selective(), make_batches(MIX)
    with watching(model) as probe:
        assert_close(measure(probe, model, batches), expected(probe, model, batches))


def test_autocast_costs_its_own_rounding_and_no_more() -> None:
    torch.manual_seed(0)
    model, batches = TinyModel(), make_batches(MIX)
    with watching(model) as probe:
        found = measure(probe, model, batches, half=True)
        assert_close(found, expected(probe, model, batches), part=0.05)
        assert probe._sketches[0].sums.dtype == torch.float32


def test_a_model_in_bfloat16_is_measured() -> None:
    torch.manual_seed(0)
    model, batches = TinyModel(), make_batches(MIX)
    with watching(model) as probe:
        wanted = expected(probe, model, batches)
        model.bfloat16()
        assert_close(measure(probe, model, batches), wanted, part=0.05)


@compiles
@pytest.mark.parametrize("mode", ["sketch", "exact"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_tied_to_the_embedding_has_the_gradient_of_both(mode: str, compiled: bool) -> None:
    torch.manual_seed(0)
    model, batches = TinyModel(), make_batches(MIX)
    model.head.weight = model.embedding.weight
    spec = ProbeSpec(mode=mode, sketch_rows=17, sketch_columns=12, layers=("head",))
    with watching(model, spec) as probe:
        trained: Any = torch.compile(model, backend="aot_eager") if compiled else model
        assert_close(measure(probe, trained, batches), expected(probe, model, batches))
    torch._dynamo.reset()


def test_a_layer_that_is_applied_twice_counts_both_times() -> None:
    torch.manual_seed(0)
    model, batches = TinyModel(), make_batches(MIX)
    model.blocks[2] = model.blocks[0]
    with watching(model, dataclasses.replace(WHOLE, layers=("blocks.0.*",))) as probe:
        found = measure(probe, model, batches)
        weights = [model.get_submodule(name).weight for name in probe.layer_names]
        probe.close()
        rows = domain_gradients(model, batches, weights, NUM_DOMAINS).double()  # type: ignore[arg-type]
    assert_close(found, (rows @ rows.T).numpy())


def _token_batches(ids: torch.Tensor) -> list[Batch]:
    (whole,) = make_batches([[0] * len(ids)])
    return [dataclasses.replace(whole, domain_ids=ids)]


def _token_expectation(probe: GradientProbe, model: TinyModel, batch: Batch) -> NDArray[np.float64]:
    twin = TinyModel()
    twin.load_state_dict(model.state_dict())
    weights: Any = [twin.get_submodule(name).weight for name in probe.layer_names]
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    for name in probe.layer_names:

        def keep(_: nn.Module, taken: Any, output: torch.Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = taken[0].detach(), output
            output.retain_grad()

        twin.get_submodule(name).register_forward_hook(keep)
    summed_loss(twin, batch).backward()  # type: ignore[no-untyped-call]
    rows = []
    for domain in range(NUM_DOMAINS):
        mine = batch.domain_ids == domain
        parts = [
            outputs[name].grad[mine].T @ inputs[name][mine]  # type: ignore[index]
            for name in probe.layer_names
        ]
        rows.append(torch.cat([part.flatten() for part in parts]).double())
    # The whole gradient is autograd's: what is left apart above adds up to it.
    for name, weight in zip(probe.layer_names, weights, strict=True):
        assert twin.get_submodule(name).weight.grad is weight.grad
    stacked = torch.stack(rows)
    whole = torch.cat([weight.grad.flatten() for weight in weights])
    if bool((batch.domain_ids >= 0).all()):
        torch.testing.assert_close(stacked.sum(0).float(), whole, rtol=1e-4, atol=1e-6)
    return (stacked @ stacked.T).numpy()


@pytest.mark.parametrize("mode", ["sketch", "exact"])
@pytest.mark.parametrize("lowest", [0, -1])
def test_several_domains_in_a_row_are_told_apart_by_token(mode: str, lowest: int) -> None:
    torch.manual_seed(0)
    model = TinyModel()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(lowest, NUM_DOMAINS, (3, 6), generator=generator)
    batches = _token_batches(ids)
    with watching(model, dataclasses.replace(WHOLE, mode=mode)) as probe:
        found = measure(probe, model, batches)
        assert_close(found, _token_expectation(probe, model, batches[0]))


def test_losses_are_told_apart_by_token() -> None:
    ids = torch.tensor([[0, 0, 1, 3, 3, -1], [1, 1, 1, 2, 2, 0]])
    (batch,) = _token_batches(ids)
    losses = torch.rand(2, 6) * batch.loss_mask
    counted = DomainLosses(NUM_DOMAINS)
    counted.add(losses, batch)
    copied = counted.finish()
    assert copied is not None
    sums = copied.wait()
    for domain in range(NUM_DOMAINS):
        mine = ids == domain
        assert sums[domain, 0] == pytest.approx(losses[mine].sum().item(), rel=1e-6)
        assert sums[domain, 1] == (batch.loss_mask & mine).sum().item()


def test_hidden_states_that_lie_token_by_token_are_turned() -> None:
    class TokenFirst(TinyModel):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(tokens)
            return self.head(hidden.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, batches = TokenFirst(), make_batches(MIX)
    spec = ProbeSpec(sketch_rows=17, sketch_columns=12, layers=("head",))
    with watching(model, spec) as probe:
        found = measure(probe, model, batches)
        weights: Any = [model.head.weight]
        probe.close()
        rows = domain_gradients(model, batches, weights, NUM_DOMAINS).double()
    assert_close(found, (rows @ rows.T).numpy())


def test_ids_of_another_length_than_the_sequences_are_refused() -> None:
    model = TinyModel()
    (batch,) = _token_batches(torch.zeros(2, 4, dtype=torch.long))
    with watching(model) as probe:
        probe.begin(batch)
        with pytest.raises(ConfigError, match="cannot tell which hidden states"):
            model(batch.tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: CUDA graphs need a GPU")
def test_a_cuda_graph_counts_what_each_replay_sees() -> None:
    torch.manual_seed(0)
    model = TinyModel().cuda()
    on_device = [
        [_to_cuda(batch) for batch in make_batches(MIX, seed=step, step=step)] for step in range(3)
    ]
    with watching(model) as probe:
        first = on_device[0][0]
        tokens, labels, mask = first.tokens.clone(), first.labels.clone(), first.loss_mask.clone()
        static = dataclasses.replace(first, tokens=tokens, labels=labels, loss_mask=mask)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                probe.begin(first)
                summed_loss(model, static).backward()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        probe.begin(first)
        with torch.cuda.graph(graph):
            summed_loss(model, static).backward()  # type: ignore[no-untyped-call]
        for batches in on_device:
            for batch in batches:
                probe.begin(batch)
                for held, new in (
                    (tokens, batch.tokens),
                    (labels, batch.labels),
                    (mask, batch.loss_mask),
                ):
                    held.copy_(new)
                graph.replay()
            measured = probe.finish(batches[0].step, loss_scale=1.0).alignment
            assert measured is not None
            twin = TinyModel()
            twin.load_state_dict({name: one.cpu() for name, one in model.state_dict().items()})
            step = int(batches[0].step)
            plain = make_batches(MIX, seed=step, step=step)
            assert_close(measured.wait(timeout_s=10), expected(probe, twin, plain), part=1e-3)


def _to_cuda(batch: Batch) -> Batch:
    names = ("tokens", "labels", "loss_mask", "domain_ids")
    return dataclasses.replace(batch, **{name: getattr(batch, name).cuda() for name in names})
