"""Long runs that never took place, and controllers that serve their pages."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from controller import history as past
from controller.config import RunConfig, parse_run
from controller.ledger import Ledger
from controller.ledger_schema import (
    Entry,
    Kind,
    cursors_entry,
    event_entry,
    membership_entry,
    observation_body,
    plan_entry,
    quarantine_entry,
    seal_entry,
)
from controller.membership import Membership
from controller.metrics import Totals
from controller.observation import StepObservation
from controller.prepare import prepare
from protos.apportion import no_carry
from protos.dataset_index import DatasetIndex, ShardRef
from protos.spec import RunSpec
from protos.types import Generation, Mixture, Plan, Quarantine, Rank, Step
from tests.fakes_controller import places_after, run_document

ROOT = Path(__file__).parents[1]
END_S = 60.0

HOSTILE = (
    "<img src=x onerror=document.title='hit'>",
    "\u202eright-to-left",
    "long-" + "x" * 150,
    "emoji \U0001f9ea\U0001f469\u200d\U0001f52c",
    '"><script>window.hit=1</script>',
    "__proto__",
    "عربي",
)
"""Names of domains that whoever wrote the data chose."""


def many_domains(count: int) -> tuple[str, ...]:
    """Return names, the hostile ones first."""
    plain = (f"domain-{number:03}" for number in range(len(HOSTILE), count))
    return (*HOSTILE, *plain)[:count]


def page_run(folder: Path, domains: Sequence[str], *, steps: int, **changes: Any) -> RunConfig:
    """Return a run of these domains with a page, whose index exists."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {name: {"shards": [f"{place}.tar"]} for place, name in enumerate(domains)}
    shares = {name: 1 / len(domains) for name in domains}
    base = run_document(folder, steps=steps, policy={"name": "static", "mixture": shares})
    base["batch"]["global_sequences"] = 256
    base["dashboard"] = {"address": "127.0.0.1:0"}
    base["data"]["domains"] = shards
    base.update(changes)
    config = parse_run(base, source="run.yaml")
    index = DatasetIndex(
        ShardRef(
            domain=name,
            url=f"{place}.tar",
            num_bytes=10_000,
            num_samples=100,
            text_bytes=9_000,
            sha256="0" * 64,
        )
        for place, name in enumerate(domains)
    )
    config.data.index.write_bytes(index.to_parquet())
    (folder / "run.yaml").write_text(yaml.safe_dump(base, sort_keys=False, allow_unicode=True))
    return config


class Course:
    """How a run that never took place went: shares that drift, losses that fall, noise."""

    def __init__(self, num_domains: int, num_steps: int, *, align_every: int = 0) -> None:
        self._draw = np.random.default_rng(5)
        self._num_steps = num_steps
        self._align_every = align_every
        self._logits = self._draw.normal(size=(3, num_domains))
        self._start = 4 + 2 * self._draw.random(num_domains)
        self._sketch = self._draw.normal(size=(num_domains, 12)) + 0.6

    def shares(self, step: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[domains]: shares at a step, with few digits, which keeps the ledger small."""
        at = step / self._num_steps
        wave = self._logits[1] * np.sin(6 * at + 3 * self._logits[2])
        weights = np.exp(0.8 * self._logits[0] + 1.2 * at * wave)
        rounded = np.round(weights / weights.sum(), 4)
        rounded[0] += 1 - rounded.sum()
        return np.asarray(np.round(rounded, 4), dtype=np.float64)

    def observation(self, step: int) -> StepObservation:
        """Return what the ranks would have said of a step."""
        planned = self.shares(step)
        num_domains = len(planned)
        sequences = np.floor(planned * 256 + self._draw.random(num_domains)).astype(np.int64)
        tokens = sequences * 16
        fall = 0.45 * np.exp(-5 * step / self._num_steps) + 0.55
        loss = self._start * fall + 0.05 * self._draw.normal(size=num_domains)
        alignment = None
        if self._align_every and step % self._align_every == 0:
            sketch = tokens[:, None] * (self._sketch + self._draw.normal(size=self._sketch.shape))
            alignment = sketch @ sketch.T
        none: np.ndarray[Any, np.dtype[np.float64]] = np.zeros(0)
        return StepObservation(
            step=Step(step),
            num_steps=self._num_steps,
            planned=planned,
            sequences=sequences,
            tokens=tokens,
            loss_sum=np.round(loss * tokens, 1),
            alignment=alignment,
            weight_norms=none,
            update_norms=none,
        )


def write_course(
    config: RunConfig, num_steps: int, *, align_every: int = 0, plan_every: int = 50
) -> None:
    """Write a ledger as if the run had trained so many steps; a controller can go on from there."""
    prepared = prepare(config)
    spec = prepared.spec
    course = Course(spec.num_domains, spec.num_steps, align_every=align_every)
    carry = tuple(no_carry(spec.num_domains).tolist())
    with Ledger(config.ledger_path) as ledger:
        past.begin(ledger, spec, prepared.initial, config.model_dump(mode="json"))
        entries = [membership_entry(_membership(spec))]
        version = 1
        for step in range(num_steps):
            if step and step % plan_every == 0:
                version += 1
                mixture = Mixture.from_shares(course.shares(step).tolist())
                plan = Plan(
                    version=version, first_step=Step(step), mixture=mixture, carry_q32=carry
                )
                entries.append(plan_entry(plan, reason="policy"))
            entries.append(_step_entry(course.observation(step)))
            if len(entries) >= 500:
                ledger.commit(entries)
                entries = []
        bad = Quarantine(domain=spec.domains[0], shard="<b>0.tar</b>", sample=3, reason="torn")
        entries.append(quarantine_entry(bad, worker_id="worker-0"))
        entries.append(event_entry("worker lost", worker="<i>w</i>", reason="silent for too long"))
        last = num_steps - 1
        # Where the lanes stand: else a controller would go through all plans from the first on.
        entries.append(cursors_entry(Step(last), places_after(last, spec), Generation(1)))
        still = no_carry(spec.num_domains)
        entries += [
            seal_entry(through, observed_through=last, carry_after=still)
            for through in (last, last + 2)
        ]
        ledger.commit(entries)


def _membership(spec: RunSpec) -> Membership:
    start = places_after(0, spec)
    return Membership(
        generation=Generation(1),
        world_size=2,
        first_step=Step(0),
        attempt_ids={Rank(0): "a-0", Rank(1): "a-1"},
        cursors=start,
        cursor_steps=dict.fromkeys(start, Step(0)),
    )


def _step_entry(observation: StepObservation) -> Entry:
    body = {
        "generation": 1,
        "world_size": 2,
        "observation": observation_body(observation),
        "to_policy": True,
        "proposed_step": int(observation.step) + 2,
        "proposal": observation.planned.tolist(),
        "decided_q32": None,
        "policy_phase": "acting",
        "diagnostics": {"reward_snr": 1.25},
        "reasons": ["max_change: held back a domain"] if observation.step % 3 == 0 else [],
        "decision_ms": 1.5,
        "executed_plan_versions": [1],
        "degraded": False,
        "step_s": 0.4,
        "data_wait_s": 0.01,
        "probe_s": 0.0,
        "totals": Totals(tokens=int(observation.tokens.sum())).as_json(),
    }
    return Entry(kind=Kind.STEP, step=observation.step, body=body)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A controller's process, and where it is."""

    process: subprocess.Popen[str]
    page: str
    address: str


def hear_status(page: str, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Watch a page until it tells a status that is wanted; return that.

    Raises:
        AssertionError: it tells none.
    """
    deadline_s, told = time.monotonic() + END_S, b"nothing"
    with urllib.request.urlopen(f"{page}api/events", timeout=END_S) as stream:
        is_status = False
        for line in stream:
            if is_status and is_wanted(status := json.loads((told := line).removeprefix(b"data:"))):
                return dict(status)
            is_status = line == b"event: status\n"
            assert time.monotonic() < deadline_s, told
    raise AssertionError(f"the page told no more after {told!r}")


def is_trained(status: dict[str, Any]) -> bool:
    """Say whether a status has all that is known of a run only while it trains."""
    alive, _ = status["num_workers"]
    return bool(
        alive
        and status["phase"] == "running"
        and abs(sum(status["mixture"]) - 1) < 1e-3
        and all(loss is not None for loss in status["loss"])
        and status["tokens_per_s"] > 0
        and len(status["ranks"]["rows"]) == status["world_size"]
        and all(worker["state"] == "serving" for worker in status["workers"])
        and any(worker["sequences"] > 0 for worker in status["workers"])
    )


@contextmanager
def served(run_file: Path) -> Iterator[Served]:
    """Run a controller with a page for as long as the block lasts."""
    command = [sys.executable, "-m", "controller", str(run_file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            page, ready = process.stdout.readline(), process.stdout.readline()
            assert page.startswith("headrace page at "), page
            yield Served(process=process, page=page.split()[-1], address=ready.split()[-1])
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(END_S)
