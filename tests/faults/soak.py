"""A run of two ranks under random faults for as long as told: `python -m tests.faults.soak`.

The seed draws which fault strikes whom and when. Processes are killed in the first part only, so
that in the rest each of them lives long enough for a leak to show; they are frozen throughout.
Afterwards the offline checker says whether anything was lost, doubled, or out of order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from controller.ledger import read_rows, reading_ledger
from controller.ledger_schema import Kind
from deploy.record import LEDGER
from tests.fakes_consumer import write_corpus
from tests.faults.checker import check, longest_wait_s, missing_reports, read_evidence
from tests.faults.processes import PLENTY_S, FaultRun, fault_run, write_fault_run
from tests.faults.rank import EVENTS
from tests.faults.soak_figures import WARM_S, Sample, draw, growth, look, write_samples

NUM_STEPS = 1_000_000
"""More than are trained."""

WORLD_SIZE = 2
LAG = 80
KILLS_FOR = 0.6
"""The share of the time in which processes are killed."""

KILLS = ("kill controller", "kill worker", "kill ranks")
FREEZES = ("freeze controller", "freeze worker", "freeze rank")
LONGEST_FREEZE_S = 4.0
KEPT_WORKER = "w1"
"""Never killed: it shows what an hour does to a worker."""

PROGRESS_STEPS = 3


@dataclass
class Soak:
    """A run, what has been done to it, and what it took."""

    run: FaultRun
    draw: random.Random
    step_s: float
    began_s: float = field(default_factory=time.monotonic)
    faults: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """When, and how many bytes the ledger had."""

    stop: threading.Event = field(default_factory=threading.Event)

    def elapsed_s(self) -> float:
        """Return for how long the soak has run."""
        return time.monotonic() - self.began_s

    def start_ranks(self) -> None:
        """Start the ranks, from the last checkpoint if there is one."""
        options = ["--state", str(self.run.out / "state{rank}.json"), "--state-every", "20"]
        states = self._states()
        if states:
            # Nothing keeps these ranks in step: a checkpoint is what all of them have reached.
            resume = self.run.out / "resume.json"
            resume.write_text(json.dumps(min(states, key=lambda state: state["step"])))
            options += ["--resume", str(resume)]
        self.run.start_ranks(WORLD_SIZE, until=NUM_STEPS, step_s=self.step_s, options=options)

    def _states(self) -> list[dict[str, Any]]:
        """Return the ranks' newest states; none at all unless every rank has one."""
        paths = [self.run.out / f"state{rank}.json" for rank in range(WORLD_SIZE)]
        if not all(path.exists() for path in paths):
            return []
        return [json.loads(path.read_text()) for path in paths]

    def strike(self, kind: str) -> None:
        """Do one fault and wait until all ranks train on.

        Raises:
            AssertionError: they do not, or a process has died by itself.
        """
        struck_s, began_s = time.monotonic(), self.elapsed_s()
        note = self._do(kind)
        over_s = time.monotonic()
        self._await_progress(over_s, kind)
        self.faults.append(
            {
                "kind": kind,
                "time_s": round(began_s, 2),
                "fault_s": round(over_s - struck_s, 2),
                "training_again_s": round(time.monotonic() - over_s, 2),
                "note": note,
            }
        )

    def _do(self, kind: str) -> str:
        run = self.run
        if kind == "kill controller":
            return f"pid {run.controller.kill()}"
        if kind == "kill worker":
            victim = next(name for name in run.workers if name != KEPT_WORKER)
            status = run.workers.pop(victim).end(signal.SIGKILL)
            assert status == -signal.SIGKILL, f"worker {victim} had ended before, with {status}"
            run.add_worker(victim)
            return victim
        if kind == "kill ranks":
            deadline = time.monotonic() + PLENTY_S
            while not self._states():
                assert time.monotonic() < deadline, "no checkpoint"
                time.sleep(0.1)
            for rank in run.ranks:
                rank.process.kill()
                assert rank.process.wait(PLENTY_S) == -signal.SIGKILL, rank.log.read_text()[-2000:]
            self.start_ranks()
            return f"{WORLD_SIZE} ranks"
        pids = {
            "freeze controller": [run.controller.current.pid],
            "freeze worker": [worker.process.pid for worker in run.workers.values()],
            "freeze rank": [rank.process.pid for rank in run.ranks],
        }[kind]
        pid = self.draw.choice(pids)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.draw.uniform(0.5, LONGEST_FREEZE_S))  # the fault itself
        os.kill(pid, signal.SIGCONT)
        return f"pid {pid}"

    def _await_progress(self, since_s: float, kind: str) -> None:
        deadline = time.monotonic() + 2 * PLENTY_S
        while not all(self._steps_since(rank, since_s) for rank in range(WORLD_SIZE)):
            assert time.monotonic() < deadline, f"ranks do not train on after: {kind}"
            self.look_after()
            time.sleep(0.1)

    def _steps_since(self, rank: int, since_s: float) -> bool:
        """Say whether a rank has ended some steps since."""
        lines = _tail(self.run.out / EVENTS / f"rank{rank}.jsonl").splitlines()[1:]
        events = [json.loads(line) for line in lines if line.endswith(b"}")]
        ended = [each for each in events if each["event"] == "step" and each["time_s"] > since_s]
        return len(ended) >= PROGRESS_STEPS

    def look_after(self) -> None:
        """See that whoever should be there is.

        Raises:
            AssertionError: a rank or a worker has died by itself.
        """
        for rank in self.run.ranks:
            assert rank.process.poll() is None, rank.log.read_text()[-2000:]
        for worker in self.run.workers.values():
            assert worker.process.poll() is None, f"worker {worker.worker_id} has ended by itself"

    def sample(self) -> None:
        """Look at every process and at the ledger."""
        now_s = self.elapsed_s()
        pids = {"controller": self.run.controller.current.pid, "soak": os.getpid()}
        pids |= {name: worker.process.pid for name, worker in list(self.run.workers.items())}
        pids |= {f"rank{rank.rank}": rank.process.pid for rank in list(self.run.ranks)}
        found = [look(role, pid, time_s=now_s) for role, pid in pids.items()]
        self.samples += [sample for sample in found if sample is not None]
        ledger = self.run.out / LEDGER
        self.sizes.append((now_s, sum(path.stat().st_size for path in _files_of(ledger))))

    def keep_sampling(self, every_s: float) -> None:
        """Sample until told to stop."""
        while not self.stop.wait(every_s):
            self.sample()


def _files_of(ledger: Path) -> list[Path]:
    return [path for path in (ledger, ledger.with_name(f"{ledger.name}-wal")) if path.exists()]


def _tail(path: Path, num_bytes: int = 16_384) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - num_bytes, 0))
        return file.read()


def soak(
    folder: Path,
    *,
    seconds: float,
    seed: int,
    step_s: float,
    every_s: float,
    asked: threading.Event,
) -> dict[str, Any]:
    """Run, strike, check; return the figures, which are also in `soak.json` of the folder.

    `asked` ends it early.

    Raises:
        AssertionError: a process died by itself or ranks ceased to train.
    """
    torch.set_num_threads(1)
    run_file = write_fault_run(
        folder / "run",
        write_corpus(folder / "data", documents=(600, 450, 300)),
        steps=NUM_STEPS,
        policy={"name": "odm", "warmup_steps": 10},
        control={"lag": LAG, "snapshot_every": 50},
    )
    with fault_run(run_file) as run:
        found = Soak(run, random.Random(seed), step_s)
        found.start_ranks()
        run.wait_observed(5)
        found.began_s = time.monotonic()
        found.sample()
        sampler = threading.Thread(
            target=found.keep_sampling, args=(2.0 if seconds < 300 else 10.0,), name="sampler"
        )
        sampler.start()
        try:
            _strike_until(found, seconds, every_s, asked)
        finally:
            found.stop.set()
            sampler.join()
        trained_s = found.elapsed_s()
        last = run.last_logged_step()
        run.wait_observed(last)
        controllers = [start.exit_status for start in run.controller.starts]
    return _report(found, folder, seed=seed, trained_s=trained_s, controllers=controllers)


def _strike_until(found: Soak, seconds: float, every_s: float, asked: threading.Event) -> None:
    """Strike at random moments; each kind comes once before any comes twice."""
    waiting: list[str] = []
    while not asked.is_set():
        pause_s = min(found.draw.uniform(0.3, 1.7) * every_s, seconds - found.elapsed_s())
        if pause_s <= 0:
            return
        asked.wait(pause_s)
        found.look_after()
        if found.elapsed_s() >= seconds or asked.is_set():
            return
        kills_too = found.elapsed_s() < KILLS_FOR * seconds
        waiting = [kind for kind in waiting if kills_too or kind in FREEZES]
        if not waiting:
            waiting = [*FREEZES, *(KILLS if kills_too else ())]
            found.draw.shuffle(waiting)
        found.strike(waiting.pop())


def _report(
    found: Soak, folder: Path, *, seed: int, trained_s: float, controllers: list[int]
) -> dict[str, Any]:
    out = found.run.out
    broken = check(out)
    evidence, findings = read_evidence(out)
    steps = [event for event in evidence.events if event["event"] == "step"]
    warm_s = WARM_S if trained_s > 2 * WARM_S else 0.0
    report = {
        "seed": seed,
        "seconds": round(trained_s, 1),
        "broken_promises": broken,
        "faults": dict(sorted(Counter(fault["kind"] for fault in found.faults).items())),
        "steps": max(event["step"] for event in steps) + 1,
        "sequences": findings.account.num_sequences,
        "trained_again": findings.history.num_superseded,
        "generations": findings.record.num_generations,
        "reports_missing": missing_reports(evidence),
        "degraded_steps": sum(event["degraded"] for event in steps),
        "longest_wait_s": round(longest_wait_s(evidence), 2),
        "controller_exits": dict(Counter(map(str, controllers))),
        "warm_s": warm_s,
        "growth": growth(found.samples, warm_s=warm_s),
        "ledger": _ledger_growth(found),
        "struck": found.faults,
    }
    (folder / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    write_samples(found.samples, folder / "samples.jsonl")
    title = f"{trained_s:.0f} s, seed {seed}, {len(found.faults)} faults"
    draw(found.samples, found.faults, folder / "soak.png", title=title)
    return report


def _ledger_growth(found: Soak) -> dict[str, Any]:
    """Return the file's growth beside what its rows say: their own bytes, and how many a step."""
    with reading_ledger(found.run.out / LEDGER) as database:
        rows = list(read_rows(database))
    body_bytes = sum(len(json.dumps(row.body, separators=(",", ":"))) for row in rows)
    num_steps = sum(row.kind is Kind.STEP for row in rows)
    (first_s, first), (last_s, last) = found.sizes[0], found.sizes[-1]
    return {
        "bytes": last,
        "rows": len(rows),
        "rows_per_step": round(len(rows) / max(num_steps, 1), 2),
        "body_bytes": body_bytes,
        "file_over_bodies": round(last / body_bytes, 2),
        "mib_per_h": round((last - first) / (1 << 20) / max(last_s - first_s, 1.0) * 3600, 2),
        "bytes_per_step": round(last / max(num_steps, 1)),
    }


def main() -> int:
    """Soak; return 0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=0.1, help="what a step takes at least")
    parser.add_argument("--every-s", type=float, default=20.0, help="between faults, on average")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), help="a new folder")
    options = parser.parse_args()
    if options.out.exists():
        print(f"soak: {options.out} is there already: move it aside", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True)
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    report = soak(
        options.out.resolve(),
        seconds=options.seconds,
        seed=options.seed,
        step_s=options.step_s,
        every_s=options.every_s,
        asked=asked,
    )
    print(json.dumps({name: report[name] for name in report if name != "struck"}, indent=2))
    return 1 if report["broken_promises"] else 0


if __name__ == "__main__":
    sys.exit(main())
