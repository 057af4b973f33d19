"""The page's curves: bounded, whatever the run's length, and true to its means."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.dashboard.alignment import HeatMap, rewards_of
from controller.dashboard.ledger_tail import BACKLOG_ROWS, LedgerTail
from controller.dashboard.series import MAX_POINTS, Point, Series
from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind
from tests.fakes_page import Course, page_run, write_course


def _numbers(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _point(step: int, share: float, loss: float = 2.0) -> Point:
    pair = np.array([share, 1 - share])
    return Point(
        step=step,
        planned=pair,
        executed=pair,
        loss=np.array([loss, np.nan]),
        reward=np.full(2, np.nan),
        tokens_per_s=10.0,
        data_wait_share=0.5,
        decision_ms=1.0,
        step_s=0.1,
    )


@pytest.mark.parametrize("num_steps", [1, 8, 9, 100, 1000])
def test_buckets_hold_the_means_of_their_steps_however_many_there_are(num_steps: int) -> None:
    series = Series(2, max_points=8)
    for step in range(num_steps):
        series.add(_point(step, step / num_steps, loss=float(step)))
    told = series.curves([0, 1])
    width = told["width"]
    assert told["length"] == -(-num_steps // width) <= 8
    assert width == 1 or num_steps > 4 * width
    steps = [np.arange(num_steps)[at : at + width] for at in range(0, num_steps, width)]
    expected = np.array([each.mean() for each in steps])
    assert _numbers(told["loss"][0]) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(_numbers(told["loss"][1])).all()
    assert _numbers(told["planned"][0]) == pytest.approx(expected / num_steps, rel=1e-6)
    assert _numbers(told["data_wait_share"]) == pytest.approx(0.5)


def test_news_are_the_buckets_that_changed_and_no_others() -> None:
    series = Series(2, max_points=8)
    for step in range(5):
        series.add(_point(step, 0.5))
    first = series.news(None, most=4)
    assert [index for index, _ in first["points"]] == [4]
    assert series.news(first["version"], most=4)["points"] == []
    series.add(_point(2, 0.1))
    series.add(_point(5, 0.2))
    after = series.news(first["version"], most=4)
    assert [index for index, _ in after["points"]] == [2, 5]
    assert _numbers(after["points"][0][1])[0] == pytest.approx(0.3)
    assert not after["gap"]
    assert series.news(0, most=4)["gap"]
    assert _numbers(after["means"])[0] == pytest.approx((5 * 0.5 + 0.1 + 0.2) / 7)


def test_buckets_that_are_merged_make_what_was_sent_before_void() -> None:
    series = Series(2, max_points=4)
    for step in range(4):
        series.add(_point(step, 0.5))
    before = series.news(None, most=4)
    series.add(_point(4, 0.5))
    assert series.news(before["version"], most=4)["epoch"] > before["epoch"]


def test_the_reward_is_how_far_a_gradient_points_where_the_others_do() -> None:
    course = Course(3, 10, align_every=1)
    observation = course.observation(0)
    tokens = observation.tokens.astype(np.float64)
    assert observation.alignment is not None
    mean = observation.alignment / np.outer(tokens, tokens)
    length = np.sqrt(np.diag(mean)).mean()
    expected = [(mean[k].sum() - mean[k, k]) / length for k in range(3)]
    assert rewards_of(observation) == pytest.approx(np.array(expected))
    heat = HeatMap(3)
    heat.add(observation)
    told = heat.packed()
    cells = np.frombuffer(base64.b64decode(str(told["cells"])), np.int8).reshape(3, 3)
    cosine = mean[0, 1] / np.sqrt(mean[0, 0] * mean[1, 1])
    assert cells[0, 1] == round(float(cosine) * 127)
    assert (np.diag(cells) == 127).all()


def test_a_long_ledger_is_read_in_a_bounded_number_of_steps_spread_evenly(tmp_path: Path) -> None:
    config = page_run(tmp_path, ("web", "code", "books"), steps=6000)
    write_course(config, 5000)
    tail = LedgerTail(config.ledger_path, 3)
    tail.read_on(0.4)
    assert tail.newest_step == 4999
    assert tail.num_skipped == 5000 - BACKLOG_ROWS
    told = tail.series.curves([0])
    assert told["length"] * told["width"] >= 5000
    assert np.isfinite(_numbers(told["planned"][0])).all()
    assert [event["event"] for event in tail.events] == ["ranks joined", "worker lost"]


def test_a_range_of_a_long_run_is_read_in_points_as_fine_as_there_are(tmp_path: Path) -> None:
    config = page_run(tmp_path, ("web", "code", "books"), steps=6000)
    write_course(config, 5000)
    tail = LedgerTail(config.ledger_path, 3)
    course = Course(3, 6000)
    observations = [course.observation(step) for step in range(5000)]
    told = tail.between(1000, 1299).curves([1])
    assert (told["width"], told["length"]) == (1, 300)
    loss = [observations[step].loss[1] for step in range(1000, 1300)]
    assert _numbers(told["loss"][0]) == pytest.approx(np.array(loss), rel=1e-6, nan_ok=True)
    for first, last in ((100, 1200), (0, 4999), (4900, 9000)):
        told = tail.between(first, last).curves([0])
        num_steps = min(last, 4999) - first + 1
        assert told["length"] == -(-num_steps // told["width"]) <= MAX_POINTS
        assert np.isfinite(_numbers(told["planned"][0])).all()
    assert tail.between(5000, 6000).curves([0])["length"] == 0


def test_steps_that_were_abandoned_are_not_drawn(tmp_path: Path) -> None:
    config = page_run(tmp_path, ("web", "code", "books"), steps=100)
    write_course(config, 20)
    tail = LedgerTail(config.ledger_path, 3)
    tail.read_on(0.4)
    before = tail.series.epoch
    with Ledger(config.ledger_path) as ledger:
        fork = {"generation": 2, "trained_through": 19}
        ledger.commit([Entry(kind=Kind.FORK, step=12, body=fork)])
    tail.read_on(0.4)
    assert tail.newest_step == 11
    told = tail.series.curves([0])
    assert told["epoch"] > before
    assert told["length"] == 12
    assert tail.between(8, 19).curves([0])["length"] == 4
