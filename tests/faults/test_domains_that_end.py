"""Domains that are read to their end, or have less than they are asked for: never a wait."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.report import checks, examine
from protos.errors import DomainEmpty
from tests.fakes_consumer import consumed_run, global_batches, write_corpus, write_run
from tests.harness_runs import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NUM_STEPS = 60
MOSTLY_BOOKS = {"name": "static", "mixture": {"web": 0.1, "code": 0.1, "books": 0.8}}
TINY = (60, 45, 15)
"""Documents a domain: `books` has one a lane and epoch, or none."""


@pytest.mark.fault_row(28, "a domain ends many times, under ranks of unequal shares")
def test_a_domain_that_ends_begins_anew_for_each_lane_and_no_rank_waits_for_another(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    patterns = write_corpus(tmp_path / "data", documents=TINY)
    batches = []
    for world_size in (1, 3):  # 20 sequences a step: ranks of 6 and of 7
        out = tmp_path / f"{world_size}"
        run_file = write_run(out, patterns, steps=NUM_STEPS, policy=MOSTLY_BOOKS)
        with consumed_run(run_file) as run:
            run.consume(world_size, until=NUM_STEPS)
            batches.append(global_batches(run.deliveries()))
    assert batches[0] == batches[1]
    findings = examine(out)
    assert findings.clean, checks(findings)["faults"]
    counts = Counter((step, domain) for (step, _), (domain, *_) in batches[1].items())
    assert all(counts[step, "books"] == 16 for step in range(NUM_STEPS))
    ended = checks(findings)["complete_epochs"]["books"]
    assert ended >= 10
    record_injections(ended, "epochs of a domain of 15 documents")


@pytest.mark.fault_row(28, "a domain has been read as often as it may be")
def test_a_domain_that_was_read_often_enough_gives_its_share_to_the_others(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    # Of the others there is enough to the end of the run.
    patterns = write_corpus(tmp_path / "data", documents=(900, 900, 15))
    out = tmp_path / "out"
    run_file = write_run(
        out, patterns, steps=NUM_STEPS, policy=MOSTLY_BOOKS, guard={"max_epochs": 3}
    )
    with consumed_run(run_file) as run:
        run.consume(3, until=NUM_STEPS)
    findings = examine(out)
    assert findings.clean, checks(findings)["faults"]
    deliveries = list(findings.history.deliveries)
    books = [one for one in deliveries if one.domain == "books"]
    assert len(deliveries) == NUM_STEPS * 20
    # The lane that is first at the end of the third epoch ends it; some steps are sealed by then.
    assert 2 <= max(one.epoch for one in books) <= 6
    last = max(one.step for one in books)
    assert last < NUM_STEPS // 2
    after = Counter(one.domain for one in deliveries if one.step > last)
    assert after["web"] == after["code"] > 0
    record_injections(1, f"none of it after step {last}")


@pytest.mark.fault_row(28, "nothing is left of a domain that has a share")
def test_a_domain_without_a_readable_sample_ends_the_run_and_says_so(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    patterns = write_corpus(tmp_path / "data", documents=TINY)
    run_file = write_run(
        tmp_path / "out",
        patterns,
        steps=NUM_STEPS,
        policy=MOSTLY_BOOKS,
        data={"max_bad_share": 0.5},
    )
    shards = sorted((tmp_path / "data" / "books").glob("*.tar"))
    for shard in shards:
        shard.write_bytes(b"")
    with consumed_run(run_file) as run:
        began = time.monotonic()
        with pytest.raises(DomainEmpty, match=r"lane \d found no tokens in domain books"):
            run.consume(3, until=NUM_STEPS)
        assert time.monotonic() - began < 30
        lost = set(map(str, shards))
        wait_until(
            lambda: {each.shard for each in run.status().quarantines} == lost,
            timeout_s=30,
            what="the shards' quarantines",
        )
    record_injections(len(shards), "shards emptied after the index was built")
