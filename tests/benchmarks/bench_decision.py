"""What a decision costs the controller; `make bench-decision` runs it.

Deciding: AC-ODM with the published networks (5 hidden layers of 1024, batch 32) observes a step,
proposes the next mixture, and learns, on one thread. `answer` is the time until the mixture is
there: what is learned from the step is learned after that, and only the next decision waits for it.

Aggregating: the reports of all ranks of a step, each with its part of the alignment, are checked
and added up; the messages are decoded already.

Times are wall clock, and CPU time of the thread beside them, since other work on the machine makes
the former longer. Writes build/bench/decision.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from controller.aggregate import Aggregator, add_up, cursors_after
from controller.observation import StepObservation
from controller.policy.acodm.policy import AcodmPolicy
from controller.policy.config import AcodmConfig
from protos.spec import RunSpec
from protos.types import Generation, Lane, Mixture, Rank, Step, StepReport
from tests.fakes_policy import SimulatedRun, make_context

_DOMAINS = (22, 50, 100, 200)
_UPDATE_EVERY = (1, 2, 4)
_RANKS = (64, 256, 1000, 4096)
_NUM_LAYERS = 9
_PUBLISHED_STEPS = 41_667
_WARM_UP = 33
_ROUNDS = 9
_OUT = Path("build/bench/decision.json")

Figures = dict[str, float]


class _Clock:
    """Wall and CPU time of what runs on this thread, in milliseconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def time(self, call: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        call()
        self.cpu.append((time.thread_time() - cpu) * 1000)
        self.wall.append((time.perf_counter() - wall) * 1000)

    def add(self, other: _Clock) -> _Clock:
        total = _Clock()
        total.wall = [one + two for one, two in zip(self.wall, other.wall, strict=True)]
        total.cpu = [one + two for one, two in zip(self.cpu, other.cpu, strict=True)]
        return total

    def figures(self) -> Figures:
        wall = np.percentile(self.wall, [50, 99])
        return {
            "ms_p50": float(wall[0]),
            "ms_p99": float(wall[1]),
            "cpu_ms_p50": float(np.median(self.cpu)),
            "cpu_ms_mean": float(np.mean(self.cpu)),
        }


def decide(num_domains: int, *, num_steps: int, update_every: int = 1) -> dict[str, Figures]:
    """Time decisions of a policy that has gone through its warm-up."""
    context = make_context(
        num_domains, num_steps=_PUBLISHED_STEPS, global_sequences=8 * max(num_domains, 144)
    )
    floor = min(0.005, 0.5 / num_domains)
    config = AcodmConfig(warmup_steps=_WARM_UP, floor=floor, update_every=update_every)
    policy = AcodmPolicy(config, context)
    run = SimulatedRun(context=context, num_norms=_NUM_LAYERS)
    answers, learning = _Clock(), _Clock()
    for step in range(_WARM_UP + 5 + num_steps):
        observation = run.observation(step, policy.propose(Step(step)))
        if step == _WARM_UP + 5:
            assert policy.phase == "acting"
            answers, learning = _Clock(), _Clock()

        def answer(seen: StepObservation = observation) -> None:
            policy.observe(seen)
            policy.propose(Step(seen.step + 2))

        answers.time(answer)
        learning.time(policy.learn)
    return {"decide": answers.add(learning).figures(), "answer": answers.figures()}


def run_spec(num_domains: int, num_ranks: int) -> RunSpec:
    """Return a run in which each rank has a lane of 8 sequences."""
    return RunSpec(
        run_id="bench",
        seed=0,
        domains=tuple(f"domain-{index}" for index in range(num_domains)),
        lanes=num_ranks,
        global_sequences=8 * num_ranks,
        sequence_length=2048,
        window_samples=64,
        interleave=4,
        num_steps=1000,
        lag=2,
        vocab_size=50_000,
        eot_id=0,
        text_field="text",
        index_sha256="",
        tokenizer_sha256="",
        degraded_after_s=10.0,
        data_timeout_s=90.0,
    )


def step_reports(spec: RunSpec, num_ranks: int) -> list[StepReport]:
    """Return a step's reports, in the order in which they happen to come."""
    draw = np.random.default_rng(0)
    k = spec.num_domains
    reports = []
    for rank in draw.permutation(num_ranks):
        sequences = np.bincount(draw.integers(0, k, 8), minlength=k).astype(np.int64)
        sketch = draw.normal(size=(k, 16))
        norms = tuple(draw.uniform(1, 2, _NUM_LAYERS).tolist())
        reports.append(
            StepReport(
                generation=Generation(1),
                rank=Rank(int(rank)),
                step=Step(0),
                plan_version=1,
                sequences=sequences,
                tokens=sequences * spec.sequence_length,
                loss_sum=sequences * spec.sequence_length * np.float64(2.5),
                alignment_part=sketch @ sketch.T,
                alignment_share=1 / num_ranks,
                weight_norms=norms,
                update_norms=norms,
                step_s=0.5,
                cursors={Lane(int(rank)): np.ones((k, 3), np.uint32)},
            )
        )
    return reports


def aggregate(num_domains: int, num_ranks: int) -> dict[str, Figures]:
    """Time taking in and adding up the reports of a step, and of that the end alone."""
    spec = run_spec(num_domains, num_ranks)
    reports, planned = step_reports(spec, num_ranks), Mixture.uniform(num_domains)
    coming, closing = _Clock(), _Clock()
    for _ in range(_ROUNDS):
        group = Aggregator(
            spec,
            generation=Generation(1),
            world_size=num_ranks,
            first_step=Step(0),
            now=time.monotonic,
        )

        def take_in(to: Aggregator = group) -> None:
            for report in reports:
                to.add(report, sealed_through=2)

        def close(of: Aggregator = group) -> None:
            step = of.next_step
            done = of.close()
            add_up(done, spec, step=step, planned=planned, world_size=num_ranks)
            cursors_after(done)

        coming.time(take_in)
        closing.time(close)
    return {"aggregate": coming.add(closing).figures(), "close": closing.figures()}


def measure(domains: Sequence[int], ranks: Sequence[int]) -> dict[str, object]:
    """Return all figures; those asked for by name first."""
    by_k = {k: decide(k, num_steps=100 if k == domains[0] else 20) for k in domains}
    by_ranks = {number: aggregate(22, number) for number in ranks}
    for k in domains:
        by_k[k] |= aggregate(k, 256)
    by_update_every = {
        every: decide(22, num_steps=100, update_every=every) for every in _UPDATE_EVERY
    }
    first, thousand = by_k[22], by_ranks[1000]
    return {
        "decide_ms_p50_k22": first["decide"]["ms_p50"],
        "decide_ms_p99_k22": first["decide"]["ms_p99"],
        "answer_ms_p50_k22": first["answer"]["ms_p50"],
        "aggregate_ms_p50_ranks1000": thousand["aggregate"]["ms_p50"],
        "by_k": {str(k): figures for k, figures in by_k.items()},
        "by_update_every": {str(every): figures for every, figures in by_update_every.items()},
        "by_ranks": {str(number): figures for number, figures in by_ranks.items()},
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
    }


def _table(title: str, rows: dict[str, dict[str, Figures]]) -> None:
    print(f"\n{title}: p50 (CPU; its mean) / p99, ms")
    for key, row in rows.items():
        cells = [
            f"{name} {each['ms_p50']:.1f} ({each['cpu_ms_p50']:.1f}; "
            f"{each['cpu_ms_mean']:.1f}) / {each['ms_p99']:.1f}"
            for name, each in row.items()
        ]
        print(f"{key:>6}  " + "   ".join(cells))


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    figures = measure(_DOMAINS, _RANKS)
    _OUT.parent.mkdir(parents=True, exist_ok=True)
    _OUT.write_text(json.dumps(figures, indent=1))
    _table("by domains (aggregate: of 256 ranks)", figures["by_k"])  # type: ignore[arg-type]
    _table("by update_every (22 domains)", figures["by_update_every"])  # type: ignore[arg-type]
    _table("by ranks (22 domains)", figures["by_ranks"])  # type: ignore[arg-type]
    print(f"\nload average {figures['load_average']:.1f} on {figures['cpus']} CPUs; wrote {_OUT}")


if __name__ == "__main__":
    main()
