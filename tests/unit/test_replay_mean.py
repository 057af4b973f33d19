from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from controller.policy.replay_mean import mean_shares
from controller.prepare import prepare
from protos.errors import ConfigError
from protos.types import Step
from tests.fakes_controller import bench, resume_at, run_document, small_run
from tests.fakes_policy import make_context


def run_with_steps(folder: Path, counts: list[list[int]]) -> Path:
    """Run a controller whose ranks receive `counts` of web, code and books; return its folder."""
    config = small_run(folder)

    async def steps() -> None:
        with bench(config) as made:
            await made.join_all(1)
            for step, row in enumerate(counts):
                await made.report_step(step, counts=row)
            # A resume at the last step: what was trained of it before does not count.
            last = len(counts) - 1
            await made.join_all(1, attempt="b", resume=resume_at(last, made.spec))
            await made.report_step(last, counts=[8, 0, 0])
            await made.loop.flush()

    asyncio.run(steps())
    return config.out


def document(folder: Path, source: Path, **changes: Any) -> dict[str, Any]:
    policy = {"name": "replay_mean", "from": str(source)}
    return {"policy": policy, "run": "another", "out": str(folder / "another"), **changes}


@pytest.mark.parametrize("named", ["folder", "ledger"])
def test_the_mean_is_of_what_the_ranks_received_in_the_steps_that_count(
    tmp_path: Path, named: str
) -> None:
    out = run_with_steps(tmp_path, [[4, 3, 1], [6, 1, 1], [0, 4, 4]])
    source = out if named == "folder" else out / "ledger.sqlite"
    prepared = prepare(small_run(tmp_path, **document(tmp_path, source)))
    wanted = [(4 + 6 + 8) / 24, (3 + 1) / 24, (1 + 1) / 24]
    assert prepared.policy.propose(Step(5)) == pytest.approx(wanted)
    assert prepared.initial.shares == pytest.approx(wanted, abs=1e-9)
    assert prepared.spec.probe is None


def test_a_json_file_of_shares_will_do_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "shares.json"
    path.write_text(json.dumps({"domain-1": 3, "domain-0": 1}))
    assert mean_shares(path, make_context(2)) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no run: it must be a run's folder"),
        ("{", "no JSON file"),
        ("[1, 2]", "must be a JSON object of shares by domain"),
        ('{"domain-0": -1, "domain-1": 2}', "finite and not negative"),
        ('{"domain-0": true, "domain-1": 2}', "finite and not negative"),
        ('{"domain-0": 0, "domain-1": 0}', "no share is above 0"),
        ('{"domain-0": 1}', "this run has domain-1 besides, that one none"),
        ('{"domain-0": 1, "domain-1": 1, "books": 1}', "this run has none besides, that one books"),
    ],
)
def test_what_is_no_mixture_of_these_domains_is_refused(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    path = tmp_path / "shares.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        mean_shares(path, make_context(2))


def test_a_run_of_other_domains_is_refused_with_both_lists(tmp_path: Path) -> None:
    out = run_with_steps(tmp_path, [[4, 3, 1]])
    with pytest.raises(ConfigError, match=r"has domain-0, domain-1 besides, that one books, code"):
        mean_shares(out, make_context(2))


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    with bench(config):
        pass
    with pytest.raises(ConfigError, match="no step was reported yet"):
        mean_shares(config.out, make_context(2))


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ConfigError, match=r"policy.from cannot be read"):
        mean_shares(path, make_context(2))


def test_the_run_file_says_from(tmp_path: Path) -> None:
    content = run_document(tmp_path, **document(tmp_path, tmp_path / "nowhere"))
    assert content["policy"]["from"].endswith("nowhere")
    with pytest.raises(ConfigError, match=r"policy.from names .*nowhere"):
        prepare(small_run(tmp_path, **document(tmp_path, tmp_path / "nowhere")))
