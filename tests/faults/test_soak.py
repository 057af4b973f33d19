"""The soak in short: random faults upon a run of two ranks, and every promise kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.soak import FREEZES, KILLS, soak
from tests.faults.soak_figures import Sample, growth

SECONDS = 20.0


@pytest.mark.long
@pytest.mark.fault_row(39, "kills and freezes of all processes at random, for a while")
@pytest.mark.timeout(240)
def test_a_short_soak_keeps_every_promise(
    tmp_path: Path, record_injections: Callable[..., None]
) -> None:
    report = soak(
        tmp_path, seconds=SECONDS, seed=3, step_s=0.05, every_s=1.0, asked=threading.Event()
    )
    assert report["broken_promises"] == []
    assert set(report["faults"]) & set(KILLS)
    assert set(report["faults"]) <= {*KILLS, *FREEZES}
    assert report["steps"] > 50
    assert {"controller", "rank0", "rank1", "w0", "w1"} <= {
        json.loads(line)["role"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()
    }
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "soak.json").read_text()) == report
    record_injections(sum(report["faults"].values()), f"{report['steps']} steps")


def _sample(time_s: float, *, pid: int = 1, rss_mib: float, age_s: float = 1e3) -> Sample:
    return Sample(
        time_s=time_s,
        role="controller",
        pid=pid,
        age_s=age_s,
        rss_mib=rss_mib,
        descriptors=20,
        threads=5,
    )


def test_a_leak_shows_as_its_growth_an_hour_and_a_start_as_none() -> None:
    leaking = [_sample(at, rss_mib=100 + 12 * at / 3600) for at in range(0, 1800, 10)]
    starting = [_sample(at, rss_mib=5.0 * at, age_s=at) for at in range(0, 20, 2)]
    found = growth([*starting, *leaking], warm_s=600)["controller"]
    assert found["longest_life_per_h"]["rss_mib"] == pytest.approx(12.0, abs=0.01)
    assert found["longest_life_per_h"]["descriptors"] == pytest.approx(0.0, abs=0.01)
    assert found["most"]["rss_mib"] < 107


def test_two_lives_of_a_role_are_not_taken_for_one() -> None:
    first = [_sample(at, rss_mib=100.0) for at in range(0, 400, 10)]
    second = [_sample(at, pid=2, rss_mib=130.0) for at in range(400, 1200, 10)]
    found = growth([*first, *second], warm_s=0)["controller"]
    assert found["processes"] == 2
    assert found["longest_life_s"] == pytest.approx(790)
    assert found["longest_life_per_h"]["rss_mib"] == pytest.approx(0.0, abs=0.01)
