"""From records to the report: figures worked by hand, and no claim that they do not carry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.compare.figures import draw_figures
from deploy.compare.page import write_page
from deploy.compare.record import TrialRecord, mean_mixture, read_record, write_record
from deploy.compare.spec import CompareSpec
from deploy.compare.summary import summarise
from deploy.compare.table import print_results
from tests.fakes_compare import made_up_record, small_spec

ARMS = {name: {"name": name} for name in ("natural", "uniform", "acodm", "random_actor")}


def spec_of(arms: dict[str, Any] = ARMS, seeds: tuple[int, ...] = (0, 1, 2)) -> CompareSpec:
    return small_spec(Path("corpus"), arms, seeds=list(seeds))


def records_of(finals: dict[str, list[float]]) -> list[TrialRecord]:
    """One trial a number, of two domains whose losses fall to that number, one 0.2 above it."""
    return [
        made_up_record(arm, seed, [[6.0, 6.2], [5.0, 5.2], [final, final + 0.2]])
        for arm, values in finals.items()
        for seed, final in enumerate(values)
    ]


def test_metrics_and_paired_differences_worked_by_hand() -> None:
    results = summarise(
        spec_of(),
        records_of({"natural": [4.0, 4.1, 4.2], "uniform": [4.3, 4.2, 4.4], "acodm": [3.9, 4.0]}),
    )
    final = results["arms"]["natural"]["final"]
    assert final["macro"]["mean"] == pytest.approx(4.2)  # (4.1 + 0.1)
    assert final["natural"]["mean"] == pytest.approx(4.1 + 0.2 * 0.2)
    assert final["worst"]["mean"] == pytest.approx(4.3)
    assert results["arms"]["uniform"]["final"]["regret"]["mean"] == pytest.approx(0.2)
    found = results["paired"]["macro"]["uniform"]["natural"]
    assert found["differences"] == pytest.approx({"0": 0.3, "1": 0.1, "2": 0.2})
    # sd 0.1, three seeds: half the width is 4.302653 x 0.1 / sqrt(3).
    assert found["low"] == pytest.approx(0.2 - 0.248414, abs=1e-6)
    assert not found["excludes_zero"]
    # Only the seeds that both have.
    assert set(results["paired"]["macro"]["acodm"]["natural"]["differences"]) == {"0", "1"}
    assert results["arms"]["acodm"]["final_by_domain_less"]["uniform"] == pytest.approx([-0.3] * 2)
    assert results["missing"] == ["random_actor"]


def test_the_verdict_claims_only_what_excludes_zero_and_calls_the_rest_a_tie() -> None:
    finals = {
        "natural": [4.0, 4.1, 4.2],
        "uniform": [4.3, 4.2, 4.4],
        "acodm": [3.9, 4.01, 4.1],
        "random_actor": [3.95, 3.99, 4.12],
    }
    text = " ".join(summarise(spec_of(), records_of(finals))["verdict"])
    assert "Better than natural in the naturally weighted mean: acodm" in text
    assert "Not told apart from natural in the naturally weighted mean: uniform" in text
    assert re.search(r"acodm in the mean over domains: tied with random_actor", text)


def test_one_seed_decides_nothing() -> None:
    results = summarise(
        spec_of(seeds=(0,)), records_of({"natural": [4.0], "uniform": [9.0], "acodm": [1.0]})
    )
    text = " ".join(results["verdict"])
    assert "a first look" in text
    assert not re.search(r"(Better|Worse) than", text)
    assert "undecided" in text
    assert "the aim of at most 70% is not shown" in text


def test_the_steps_to_a_control_are_read_off_the_curve() -> None:
    results = summarise(
        spec_of(),
        records_of(
            {"uniform": [4.5, 4.5, 4.5], "natural": [3.0, 3.0, 3.0], "acodm": [4.0, 4.0, 4.25]}
        ),
    )
    reached = results["arms"]["acodm"]["reached"]["uniform macro"]
    # From 5.1 at step 10 down to 4.1 at step 20: 4.6 lies halfway.
    assert reached["by_seed"]["0"]["steps"] == pytest.approx(15)
    assert reached["by_seed"]["0"]["tokens"] == pytest.approx(1500)
    assert reached["by_seed"]["0"]["time"] == pytest.approx({"wall_s": 3.0, "cpu_s": 1.5})
    assert reached["by_seed"]["2"]["steps"] == pytest.approx(10 + 10 * 0.5 / 0.75)
    assert reached["share_of_steps"]["mean"] == pytest.approx((0.75 + 0.75 + 5 / 6) / 3)
    never = results["arms"]["acodm"]["reached"]["natural natural"]
    assert (never["never"], never["share_of_steps"]) == (3, None)
    text = " ".join(results["verdict"])
    assert "acodm never reaches natural's final value" in text


def test_the_aim_is_met_only_if_the_whole_interval_meets_it() -> None:
    def share_sentence(acodm: list[float]) -> str:
        finals = {"uniform": [4.9, 4.9, 4.9], "acodm": acodm}
        verdict: list[str] = summarise(spec_of(), records_of(finals))["verdict"]
        return next(each for each in verdict if each.startswith("acodm reaches uniform's"))

    # 0.1 of the way from step 10 to 20 where the end is 4.0; all but equal over seeds.
    assert "within the aim of 70%" in share_sentence([4.0, 4.0, 4.01])
    assert "is not shown" in share_sentence([4.0, 4.0, 4.89])


def test_a_proxy_run_is_charged_by_what_its_tokens_cost() -> None:
    arms = {
        "uniform": {"name": "uniform"},
        "small": {"policy": {"name": "acodm"}, "model": "300k", "shown": False},
        "acodm": {"name": "acodm", "proxy": {"artefact": {"policy_of": "small"}}},
    }
    records = [
        *records_of({"uniform": [4.5], "acodm": [4.0]}),
        made_up_record("small", 0, [[6.0, 6.0], [5.0, 5.0], [5.0, 5.0]], matrix_parameters=250),
    ]
    records[1] = made_up_record("acodm", 0, [[6.0, 6.2], [5.0, 5.2], [4.0, 4.2]], charged=["small"])
    results = summarise(spec_of(arms, seeds=(0,)), records)
    values = results["arms"]["acodm"]
    assert "small" not in results["arms"]
    assert values["charged"] == {"arms": ["small"], "steps": 5.0}  # 20 steps at a quarter
    assert values["reached"]["uniform macro"]["share_of_steps"]["mean"] == pytest.approx(1.0)
    assert any("proxy run included" in sentence for sentence in results["verdict"])


def test_the_page_needs_no_other_file_and_the_table_no_wide_screen(tmp_path: Path) -> None:
    # As long as labels get, and as wide as figures get.
    arms = {name: {"name": name} for name in ("natural", "uniform", "align_eg_uniform", "acodm")}
    finals = {
        "natural": [4.0, 4.1, 4.2],
        "uniform": [4.3, 4.2, 4.4],
        "align_eg_uniform": [3.9, 4.91, 4.1],
        "acodm": [3.95, 3.99, 4.12],
    }
    results = summarise(spec_of(arms), records_of(finals))
    write_page(results, draw_figures(results, tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page
    sources = re.findall(r"src=['\"]([^'\"]{0,30})", page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for sentence in results["verdict"]:
        assert sentence.split("'")[0] in page
    console = Console(width=80, record=True, force_terminal=False)
    print_results(results, console)
    text = console.export_text()
    assert "…" not in text
    assert all(arm in text for arm in finals)


def test_nothing_finished_is_a_report_too(tmp_path: Path) -> None:
    results = summarise(spec_of(), [])
    assert results["verdict"] == ["No trial is finished yet."]
    write_page(results, draw_figures(results, tmp_path), tmp_path / "report.html")
    print_results(results, Console(width=80, record=True))


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = made_up_record("uniform", 3, [[6.0, 6.25], [5.0, 5.125]])
    write_record(record, tmp_path)
    assert read_record(tmp_path / "record.json") == record
    assert mean_mixture(record) == {"code": 0.5, "mail": 0.5}
