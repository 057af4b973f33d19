"""What a step holds depends on seed, layout, index and plans, and on nothing else."""

from __future__ import annotations

import json
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
    # the second run takes the first one's shards.
    first = run("one-by-one", *scheduled, "--ranks", "1", "--workers", "1")
    assert len(first) == NUM_STEPS * 8
    shards = ["--config", str(tmp_path / "one-by-one" / "run.yaml"), "--digest"]
    # The second is cut in two: other numbers of ranks and workers in each part, and between them
    # than in the first.
    stopped = run("resumed", *shards, "--ranks", "2", "--workers", "3", "--until", "40")
    assert stopped == first[: 40 * 8]
    assert run("resumed", "--resume", "--digest", "--ranks", "1", "--workers", "2") == first
    report = json.loads((tmp_path / "resumed" / "report.json").read_text())
    assert report["generations"] == 2
    # The plans changed on the way, or the comparison would say little.
    assert len({json.dumps(row["domain"]) for row in first}) == 3
    assert report["plan_versions"] == 4
