"""What a step holds depends on seed, layout, index and plans, and on nothing else."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness_runs import NUM_STEPS, SCHEDULE, SMALL, complete, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def digests(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "digests.jsonl").read_text().splitlines()]


def test_ranks_workers_and_a_restart_do_not_change_what_is_trained_on(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data")
    scheduled = ["--data", str(data), "--policy", "schedule", "--set", SCHEDULE, *SMALL]

    def run(name: str, *arguments: str) -> list[dict[str, object]]:
        out = tmp_path / name
        complete(["--out", str(out), *arguments], log=tmp_path / f"{name}.log")
        report = json.loads((out / "report.json").read_text())
        faults = {key: report[key] for key in ("lost", "duplicated", "mismatched", "misordered")}
        assert not any(faults.values()), (name, faults)
        assert report["plans_obeyed"]
        return digests(out)

    # The packed shards are the same bytes for each, but their folders and so their indexes differ:
    # all runs but the first take its shards.
    first = run("one-by-one", *scheduled, "--ranks", "1", "--workers", "1")
    assert len(first) == NUM_STEPS * 8
    shards = ["--config", str(tmp_path / "one-by-one" / "run.yaml"), "--digest"]

    def stop_and_resume() -> None:
        stopped = run("resumed", *shards, "--ranks", "2", "--workers", "2", "--until", "50")
        assert stopped == first[: 50 * 8]
        again = ["--resume", "--digest", "--ranks", "1", "--workers", "1"]
        assert run("resumed", *again) == first

    # Side by side: most of a run's time goes by waiting for processes to start.
    with ThreadPoolExecutor(3) as pool:
        resumed = pool.submit(stop_and_resume)
        narrow = pool.submit(run, "two-by-one", *shards, "--ranks", "2", "--workers", "1")
        wide = pool.submit(run, "two-by-three", *shards, "--ranks", "2", "--workers", "3")
    assert narrow.result() == first
    assert wide.result() == first
    resumed.result()
    report = json.loads((tmp_path / "resumed" / "report.json").read_text())
    assert report["generations"] == 2
    # The plans changed on the way, or the comparison would say little.
    assert len({json.dumps(row["domain"]) for row in first}) == 3
    assert report["plan_versions"] == 4
