"""Which layers the probe watches: by relative depth, by pattern, and never one it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from protos.errors import ConfigError
from protos.spec import ProbeSpec
from trainer_client.layers import norm_layers, probe_layers, users_of_weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.experts = nn.ModuleList(nn.Identity() for _ in range(40))
        self.down = nn.Linear(8, 4)


class Net(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(4, 10, bias=False)


def chosen(model: nn.Module, **settings: object) -> list[str]:
    return list(probe_layers(model, ProbeSpec(**settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [(16, [11, 13, 15]), (24, [17, 20, 23]), (6, [4, 5, 3]), (4, [1, 2, 3]), (2, [0, 1]), (1, [0])],
)
def test_the_last_linear_of_blocks_at_relative_depths(num_blocks: int, expected: list[int]) -> None:
    assert chosen(Net(num_blocks)) == [f"blocks.{index}.down" for index in sorted(expected)]


def test_patterns_choose_by_name_even_through_wrappers() -> None:
    wrapped = nn.Module()
    wrapped.module = Net(3)
    assert chosen(wrapped, layers=("blocks.[02].up", "head")) == [
        "blocks.0.up",
        "blocks.2.up",
        "head",
    ]


def test_a_pattern_that_matches_nothing_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'mlp.\*' matches no nn.Linear .* e.g. blocks.0.up"):
        chosen(Net(1), layers=("mlp.*",))


def test_a_model_without_blocks_must_name_its_layers() -> None:
    with pytest.raises(ConfigError, match=r"no nn.ModuleList .* probe.layers"):
        chosen(nn.Sequential(nn.Linear(2, 2)))
    assert norm_layers(nn.Sequential(nn.Linear(2, 2))) == []


def test_layers_that_are_tied_to_one_another_count_as_one() -> None:
    model = Net(2)
    model.head.weight = model.embedding.weight
    model.blocks[1].down.weight = model.blocks[0].down.weight  # type: ignore[union-attr]
    found = probe_layers(model, ProbeSpec(layers=("head", "*.down")))
    assert list(found) == ["blocks.0.down", "head"]
    assert list(users_of_weight(model, found["head"])) == ["embedding", "head"]


def test_a_weight_that_a_layer_of_another_kind_holds_too_is_refused() -> None:
    model = Net(2)
    model.lookup = nn.EmbeddingBag(10, 4)
    model.head.weight = model.lookup.weight
    with pytest.raises(ConfigError, match="head shares its weight with lookup, a EmbeddingBag"):
        chosen(model, layers=("head",))


def test_a_frozen_layer_is_refused() -> None:
    model = Net(2)
    model.blocks.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"blocks.0.down is frozen"):
        chosen(model)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (16, [0, 1, 3, 5, 7, 9, 11, 13, 15]),
        (24, [0, 2, 5, 8, 11, 14, 17, 20, 23]),
        (4, [0, 0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_norms_come_from_nine_relative_depths_in_any_model(
    num_blocks: int, expected: list[int]
) -> None:
    model = Net(num_blocks)
    layers = [block.down for block in model.blocks]
    found = [layers.index(layer) for layer in norm_layers(model)]
    assert found == expected


def test_norms_come_from_a_sample_of_rows_and_are_exact_for_few_rows() -> None:
    from trainer_client.norms import WeightNorms

    torch.manual_seed(0)
    layers = [nn.Linear(200, 300), nn.Linear(100, 60)]
    norms = WeightNorms([layers[0], layers[1], layers[0]], seed=3)
    norms.before_first_step()
    moves = [torch.randn_like(layer.weight) * 1e-3 for layer in layers]
    with torch.no_grad():
        for layer, move in zip(layers, moves, strict=True):
            layer.weight += move
    weights, updates = norms.after_step().wait()
    exact = [layers[index].weight.norm().item() for index in (0, 1, 0)]
    assert weights.tolist() == pytest.approx(exact, rel=0.05)
    assert weights[1] == pytest.approx(exact[1], rel=1e-6)
    expected = [moves[index].norm().item() for index in (0, 1, 0)]
    assert updates.tolist() == pytest.approx(expected, rel=0.05)
    assert updates[1] == pytest.approx(expected[1], rel=1e-3)
    assert norms.after_step().wait()[1].tolist() == [0.0, 0.0, 0.0]
