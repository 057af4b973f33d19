"""What it takes to read a long ledger: export and the report's page.

`make bench-reading`, or `ARGS='--steps 100000 --domains 200'` for the numbers in the docs. The
ledger is made by the controller's own code from drawn numbers; each reader is a process of its own,
whose peak memory the system counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind, observation_body, plan_entry, seal_entry
from controller.observation import StepObservation
from protos.apportion import no_carry
from protos.types import Mixture, Plan, Step

RESULTS = Path("build/bench/reading.json")
_AT_ONCE = 100
_PLAN_EVERY = 10


def write_long_ledger(path: Path, *, num_steps: int, num_domains: int) -> None:
    """Write a run of so many steps with a plan every tenth; 200 domains take 20 KB a step."""
    rng = np.random.default_rng(0)
    domains = [f"domain-{number:03d}" for number in range(num_domains)]
    settings = {"policy": {"name": "odm"}, "data": {"domains": {name: {} for name in domains}}}
    body = {"run": "long", "order_sha256": "0" * 64, "domains": domains, "settings": settings}
    carry = tuple(no_carry(num_domains).tolist())
    with Ledger(path) as ledger:
        entries = [Entry(kind=Kind.RUN, step=-1, body=body)]
        for step in range(num_steps):
            shares = rng.dirichlet(np.full(num_domains, 2.0))
            if step % _PLAN_EVERY == 0:
                mixture = Mixture.from_shares(shares.tolist())
                version = step // _PLAN_EVERY + 1
                plan = Plan(
                    version=version, first_step=Step(step), mixture=mixture, carry_q32=carry
                )
                entries.append(plan_entry(plan, reason="policy"))
            entries += [
                _step(step, num_steps, mixture, shares, rng),
                seal_entry(step + 2, observed_through=step, carry_after=None),
            ]
            if step % _AT_ONCE == 0:
                ledger.commit(entries)
                entries = []
        ledger.commit(entries)


def _step(
    step: int, num_steps: int, mixture: Mixture, shares: Any, rng: np.random.Generator
) -> Entry:
    number = len(mixture.shares)
    sequences = rng.multinomial(4096, shares)
    tokens = sequences * 2048
    loss = 2 + 6 * np.exp(-step / num_steps) + rng.normal(0, 0.1, number)
    observation = StepObservation(
        step=Step(step),
        num_steps=num_steps,
        planned=np.asarray(mixture.shares),
        sequences=sequences,
        tokens=tokens,
        loss_sum=loss * tokens,
        alignment=None,
        weight_norms=np.zeros(0),
        update_norms=np.zeros(0),
    )
    body = {
        "generation": 1,
        "world_size": 8,
        "observation": observation_body(observation),
        "to_policy": True,
        "proposed_step": step + 2,
        "proposal": shares.tolist(),
        "decided_q32": list(mixture.shares_q32),
        "policy_phase": "acting",
        "reasons": [],
        "decision_ms": 4.0,
        "executed_plan_versions": [step // _PLAN_EVERY + 1],
        "degraded": False,
        "step_s": 0.5,
        "data_wait_s": 0.001,
        "probe_s": 0.01,
        "totals": {"tokens": step * 4096 * 2048},
    }
    return Entry(kind=Kind.STEP, step=step, body=body)


def measure(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its wall and CPU seconds and its peak memory in MB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "deploy.cli", *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"headrace {' '.join(command)} ended with {process.returncode}")
    return {
        "wall_s": round(time.monotonic() - began, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    """Measure, print, and write `build/bench/reading.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--domains", type=int, default=50)
    parser.add_argument("--ledger", type=Path, help="keep the ledger here, and use it if it exists")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        ledger = options.ledger or Path(temporary) / "ledger.sqlite"
        if not ledger.exists():
            write_long_ledger(ledger, num_steps=options.steps, num_domains=options.domains)
        out = Path(temporary) / "exported"
        figures: dict[str, Any] = {
            "steps": options.steps,
            "domains": options.domains,
            "ledger_mb": round(ledger.stat().st_size / 2**20),
            "load": os.getloadavg()[0],
            "export": measure(["export", str(ledger), str(out)]),
            "report": measure(["report", str(ledger), "--out", str(Path(temporary) / "page.html")]),
            "exported_mb": round(sum(each.stat().st_size for each in out.rglob("*")) / 2**20),
        }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
