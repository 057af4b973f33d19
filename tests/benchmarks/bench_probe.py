"""What the probe costs a training step: `make bench-probe` (ARGS='--device cuda' on a GPU).

Takes turns: a step with the probe on, one with it off, in changing order, all on one model. Off
means that nobody tells the probe of a micro-batch, so that its hooks return at once. Prints the
figures and writes them to `build/bench/probe.json`, under `cpu` or `cuda`:

- `on_over_off_median`: the median over pairs of step time on over off; `cpu_time_median` the same
  of the process's CPU time, which other load on the machine blurs less;
- `probe_s_median`: the seconds that the probe itself counted in a step, in parts of that step;
  what its products cost the step's others (caches, a copy of the watched outputs) is not in it;
- `flops_share`: products that the probe adds, in parts of the step's own, as torch counts them;
- `memory_share`: on CUDA what the peak of allocated memory rises by; on the CPU the bytes that the
  probe holds over those of weights, gradients and optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.examples.models import make_model
from protos.spec import ProbeSpec
from protos.types import Step
from trainer_client import Batch, GradientProbe
from trainer_client.loss import token_losses

OUT = Path("build/bench/probe.json")
VOCABULARY = 50_304
NUM_DOMAINS = 22
"""As many as The Pile has."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The step that is measured."""

    model: str
    sequences: int
    length: int
    half: bool


WORK = {
    "cpu": Work(model="160m", sequences=2, length=256, half=False),
    "cuda": Work(model="1b", sequences=16, length=1024, half=True),
}


class Trainer:
    """A model, its optimizer and its probe."""

    def __init__(self, work: Work, device: torch.device) -> None:
        torch.manual_seed(0)
        self._work = work
        self._device = device
        self.model = make_model(work.model, VOCABULARY, work.length).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.probe: GradientProbe | None = None
        self.probe_s = 0.0
        """What the probe counted in the last step that it was on."""

        self._step = 0

    def watch(self) -> None:
        """Put the probe on the model."""
        self.probe = GradientProbe(self.model, spec=ProbeSpec(), num_domains=NUM_DOMAINS)

    def _batch(self) -> Batch:
        work = self._work
        shape = (work.sequences, work.length + 1)
        tokens = torch.randint(VOCABULARY, shape, device=self._device)
        return Batch(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:],
            loss_mask=torch.ones(
                work.sequences, work.length, dtype=torch.bool, device=self._device
            ),
            domain_ids=torch.randint(NUM_DOMAINS, (work.sequences,), device=self._device),
            step=Step(self._step),
            slots=range(work.sequences),
            first_of_step=True,
            last_of_step=True,
            plan_version=0,
            degraded=False,
        )

    def step(self, *, on: bool) -> tuple[float, float]:
        """Make an optimizer step; return its seconds, and the process's CPU seconds."""
        batch = self._batch()
        self._step += 1
        self._wait()
        begun, cpu = time.perf_counter(), time.process_time()
        if on and self.probe is not None:
            self.probe.begin(batch)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._work.half):
            logits = self.model(batch.tokens).logits
        losses = token_losses(logits, batch)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if on and self.probe is not None:
            self.probe_s = self.probe.finish(batch.step, loss_scale=1.0).probe_s
        self._wait()
        return time.perf_counter() - begun, time.process_time() - cpu

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def products(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call's matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return what weights, gradients and optimizer take."""
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    moments = sum(
        one.numel() * one.element_size()
        for state in optimizer.state.values()
        for one in state.values()
        if torch.is_tensor(one)
    )
    return 2 * weights + moments


def probe_bytes(probe: GradientProbe, work: Work) -> int:
    """Return what a probe holds at its peak: buffers, sums, and what it keeps of each token."""
    held = 0
    for sketch in probe._sketches:
        tensors = [sketch.accumulator, sketch.sums, sketch.out_projection, sketch.in_projection]
        held += sum(one.numel() * one.element_size() for one in tensors if one is not None)
        held += work.sequences * work.length * sketch.accumulator.shape[2] * 4
    return held


def memory_share(trainer: Trainer, work: Work, device: torch.device) -> float:
    """Return how much more memory a step takes with the probe."""
    if device.type != "cuda":
        assert trainer.probe is not None
        whole = state_bytes(trainer.model, trainer.optimizer)
        return probe_bytes(trainer.probe, work) / whole
    peaks = {}
    for on in (False, True):
        if on:
            trainer.watch()
        for _ in range(2):
            trainer.step(on=on)
        torch.cuda.reset_peak_memory_stats(device)
        trainer.step(on=on)
        peaks[on] = torch.cuda.max_memory_allocated(device)
    return peaks[True] / peaks[False] - 1


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one device."""
    device = torch.device(arguments.device)
    work = WORK[device.type]
    if arguments.length is not None:
        work = replace(work, length=arguments.length)
    trainer = Trainer(work, device)
    for _ in range(2):
        trainer.step(on=False)
    if device.type == "cpu":
        trainer.watch()
    share = memory_share(trainer, work, device)
    flops = {on: products(partial(trainer.step, on=on)) for on in (False, True)}
    ratios, cpu_ratios, own, step_s = [], [], [], []
    for pair in range(arguments.pairs):
        order = (True, False) if pair % 2 else (False, True)
        taken = {on: trainer.step(on=on) for on in order}
        ratios.append(taken[True][0] / taken[False][0])
        cpu_ratios.append(taken[True][1] / taken[False][1])
        own.append(trainer.probe_s / taken[True][0])
        step_s.append(taken[False][0])
        print(f"pair {pair + 1}: {taken[False][0]:.3f} s off, x {ratios[-1]:.4f}", flush=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": work.model,
        "tokens": work.sequences * work.length,
        "pairs": arguments.pairs,
        "on_over_off_median": statistics.median(ratios),
        "on_over_off_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "cpu_time_median": statistics.median(cpu_ratios),
        "probe_s_median": statistics.median(own),
        "step_s": statistics.median(step_s),
        "flops_share": flops[True] / flops[False] - 1,
        "memory_share": share,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=list(WORK))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    arguments = parser.parse_args()
    found = run(arguments)
    print(json.dumps(found, indent=1))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(OUT.read_text()) if OUT.exists() else {}
    OUT.write_text(json.dumps({**before, arguments.device: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
