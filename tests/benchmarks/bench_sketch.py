"""How far the sketches' estimates are from exact gradients: `make bench-sketch`.

Trains a small GPT on eight kinds of real text for a while, then measures the same steps with exact
gradients and with every setting of the sketch, all on the same backward passes. Prints the tables
and writes `build/bench/sketch.json`. Errors are relative: the Frobenius norm of estimate minus
exact over that of exact, of the matrix of inner products of the domains' gradients; `reward` is
the rank correlation of what AC-ODM makes of it (each domain's inner products with all others).
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import clip_grad_norm_

from deploy.examples.models import make_model
from protos.spec import DRAWS, PROJECTIONS, ProbeSpec
from tests.text_domains import NUM_TEXT_DOMAINS, text_batch, text_domains
from trainer_client import Batch, GradientProbe
from trainer_client.loss import token_losses

OUT = Path("build/bench/sketch.json")
SIZES = (8, 16, 32, 64, 128, 256)
LAYERS = (1, 2, 3, 6)
AVERAGES = (0.0, 0.5, 0.8, 0.9)
VOCABULARY = 256

Alignment = NDArray[np.float64]


def settings() -> dict[str, ProbeSpec]:
    """Return everything that is measured, by name."""
    found = {
        f"{kind} {draw} {size}": ProbeSpec(
            sketch_rows=size, sketch_columns=size, projection=kind, draw=draw
        )
        for kind, draw, size in itertools.product(PROJECTIONS, DRAWS, SIZES)
        if draw == "step" or size in (32, 64)
    }
    found |= {f"exact {count}": ProbeSpec(mode="exact", num_layers=count) for count in LAYERS}
    found["exact all"] = ProbeSpec(mode="exact", layers=("*layers.*",))
    return found


def measure(model: nn.Module, arguments: argparse.Namespace) -> dict[str, list[Alignment]]:
    """Return the alignment that each setting saw in each measured step."""
    domains, rng = text_domains(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probes: dict[str, GradientProbe] = {}
    seen: dict[str, list[Alignment]] = {name: [] for name in settings()}
    for step in range(arguments.trained + arguments.measured):
        if step == arguments.trained:
            probes = {
                name: GradientProbe(model, spec=spec, num_domains=NUM_TEXT_DOMAINS, norms=False)
                for name, spec in settings().items()
            }
        batch = text_batch(
            domains, step, rng, per_domain=arguments.sequences, length=arguments.length
        )
        _train_step(model, optimizer, batch, probes)
        for name, probe in probes.items():
            alignment = probe.finish(batch.step, loss_scale=1.0).alignment
            assert alignment is not None
            seen[name].append(alignment.wait(timeout_s=60))
        print(f"step {step + 1} of {arguments.trained + arguments.measured}", flush=True)
    return seen


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    probes: dict[str, GradientProbe],
) -> None:
    for probe in probes.values():
        probe.begin(batch)
    losses = token_losses(model(batch.tokens).logits, batch)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def error(found: Alignment, exact: Alignment) -> float:
    """Return the relative error of an alignment."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def reward(found: Alignment, exact: Alignment) -> float:
    """Return the rank correlation of two alignments' rewards."""
    ranks = [np.argsort(np.argsort(one.sum(axis=1) - np.diag(one))) for one in (found, exact)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def compare(found: list[Alignment], exact: list[Alignment]) -> dict[str, float]:
    """Return what the steps come to: mean error, mean and least rank correlation."""
    pairs = list(zip(found, exact, strict=True))
    rewards = [reward(*pair) for pair in pairs]
    return {
        "error": float(np.mean([error(*pair) for pair in pairs])),
        "reward": float(np.mean(rewards)),
        "reward_least": min(rewards),
    }


def averaged(found: list[Alignment], past: float) -> list[Alignment]:
    """Return moving averages that give the past so much weight, corrected for their start."""
    total, weight, averages = np.zeros_like(found[0]), 0.0, []
    for one in found:
        total, weight = past * total + (1 - past) * one, past * weight + (1 - past)
        averages.append(total / weight)
    return averages


def evaluate(seen: dict[str, list[Alignment]]) -> dict[str, Any]:
    """Return all tables."""
    exact = seen["exact 3"]
    sketches = {name: compare(found, exact) for name, found in seen.items() if "exact" not in name}
    layers = {
        name: compare(found, seen["exact all"]) for name, found in seen.items() if "exact" in name
    }
    averages = {
        f"{name}, past {past:g}": compare(averaged(seen[name], past), exact)
        for name in ("exact 3", "sign step 16", "sign step 64")
        for past in AVERAGES
    }
    return {"sketches": sketches, "layers": layers, "averages": averages}


def show(tables: dict[str, Any]) -> None:
    """Print the tables."""
    print("\n| p = q | " + " | ".join(PROJECTIONS) + " |")
    print("| ---: |" + " ---: |" * len(PROJECTIONS))
    for size in SIZES:
        row = [tables["sketches"][f"{kind} step {size}"] for kind in PROJECTIONS]
        cells = [f"{one['error']:.3f} / {one['reward']:.3f}" for one in row]
        print(f"| {size} | " + " | ".join(cells) + " |")
    for title in ("layers", "averages"):
        print(f"\n| {title} | error | reward | least |\n| --- | ---: | ---: | ---: |")
        for name, one in tables[title].items():
            print(
                f"| {name} | {one['error']:.3f} | {one['reward']:.3f} | {one['reward_least']:.3f} |"
            )
    print("\n| one draw for the run | error | reward |\n| --- | ---: | ---: |")
    for name, one in tables["sketches"].items():
        if " run " in name:
            print(f"| {name} | {one['error']:.3f} | {one['reward']:.3f} |")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="70m")
    parser.add_argument("--sequences", type=int, default=4, help="of each domain in a step")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--trained", type=int, default=40, help="steps before the measurement")
    parser.add_argument("--measured", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(arguments.model, VOCABULARY, arguments.length)
    tables = evaluate(measure(model, arguments))
    show(tables)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({**vars(arguments), **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
