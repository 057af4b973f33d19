"""Domains that are run through several times: each epoch delivers the index, token for token."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from deploy.report import checks, examine
from protos.spec import PACKINGS
from tests.fakes_consumer import DOMAINS, consumed_run, write_corpus, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NUM_STEPS = 120


def _lengths(folder: Path) -> list[int]:
    """Return the numbers of tokens of a domain's documents, the empty ones aside."""
    sizes = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            sizes += [member.size // 4 for member in tar.getmembers()]
    return [size for size in sizes if size]


def _flip_a_byte(path: Path) -> int:
    """Damage a document; return how many tokens it has."""
    with tarfile.open(path) as tar:
        member = next(member for member in tar.getmembers() if member.size == 80)
    content = bytearray(path.read_bytes())
    content[member.offset_data + 41] ^= 1
    path.write_bytes(content)
    return member.size // 4


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_whole_epoch_is_the_index_less_the_quarantine_token_for_token(
    packing: str, tmp_path: Path
) -> None:
    patterns = write_corpus(tmp_path / "data")
    lengths = {name: _lengths(tmp_path / "data" / name) for name in DOMAINS}
    run_file = write_run(
        tmp_path / "out",
        patterns,
        steps=NUM_STEPS,
        data={"max_bad_share": 0.1},
        batch={"packing": packing},
    )
    lengths["code"].remove(_flip_a_byte(tmp_path / "data" / "code" / "0001.tar"))
    with consumed_run(run_file, num_workers=2) as run:
        run.consume(3, until=NUM_STEPS)
    findings = examine(tmp_path / "out")
    assert findings.clean, checks(findings)["faults"]
    assert [q.domain for q in findings.record.quarantines] == ["code"]
    assert min(checks(findings)["complete_epochs"][name] for name in DOMAINS) >= 3
    padding = [17 - one.num_tokens for one in findings.history.deliveries]
    assert any(padding)
    assert checks(findings)["padding_share"] == round(sum(padding) / (17 * len(padding)), 5)
    for epoch in findings.epochs:
        expected = lengths[epoch.domain]
        assert (epoch.num_documents, epoch.num_tokens) == (len(expected), sum(expected))
        assert epoch.tokens_delivered == sum(expected)
    ends = {
        (one.domain, one.lane): one.step for one in findings.history.deliveries if one.epoch == 1
    }
    for name in DOMAINS:
        assert len({step for (domain, _), step in ends.items() if domain == name}) > 1


def test_a_shard_damaged_before_it_was_indexed_gives_what_is_whole_of_it(tmp_path: Path) -> None:
    patterns = write_corpus(tmp_path / "data")
    path = tmp_path / "data" / "code" / "0001.tar"
    with tarfile.open(path) as tar:
        files = tar.getmembers()
        lost = files[5]
    content = bytearray(path.read_bytes())
    content[lost.offset_data - 511] ^= 1  # in the name: the header's sum does not hold
    path.write_bytes(content)
    lengths = {name: _lengths(tmp_path / "data" / name) for name in ("web", "books")}
    lengths["code"] = [
        member.size // 4
        for member in [*files[:5], *files[6:]]
        if member.size
    ]  # fmt: skip
    for other in ("0000.tar", "0002.tar"):
        with tarfile.open(path.with_name(other)) as tar:
            lengths["code"] += [member.size // 4 for member in tar if member.size]
    out = tmp_path / "out"
    run_file = write_run(out, patterns, steps=NUM_STEPS, data={"max_bad_share": 0.1})
    with consumed_run(run_file, num_workers=2) as run:
        run.consume(3, until=NUM_STEPS)
        (known, *later) = run.status().quarantines
    assert (known.domain, known.shard) == ("code", str(path))
    assert "samples were left out when the index was built" in known.reason
    assert "damaged or cut off" in known.reason
    assert {each.shard for each in later} == {str(path)}
    findings = examine(out)
    assert findings.clean, checks(findings)["faults"]
    whole = [epoch for epoch in findings.epochs if epoch.domain == "code"]
    assert len(whole) >= 3
    for epoch in findings.epochs:
        assert epoch.num_tokens == epoch.tokens_delivered == sum(lengths[epoch.domain])
