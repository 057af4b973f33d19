"""Loader workers by how long ranks wait: when there are more, when fewer, and when neither."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from deploy.autoscale import Autoscaler, Sample

GROW_S, SHRINK_S = 10.0, 60.0
HUNGRY, BETWEEN, CALM = 0.2, 0.02, 0.0


class Ranks:
    """Two ranks whose share of waiting is told; whatever the scaler wants, happens."""

    def __init__(self, *, least: int = 1, most: int = 8, workers: int = 2) -> None:
        self.scaler = Autoscaler(
            least=least, most=most, grow_after_s=GROW_S, shrink_after_s=SHRINK_S
        )
        self.workers, self._at, self._wait, self._step = workers, 0.0, 0.0, 0.0

    def train(self, seconds: float, share: float) -> list[int]:
        """Train so long; return every number of workers that there was."""
        had = [self.workers]
        for _ in range(int(seconds)):
            self._at += 1
            self._step += 2
            self._wait += 2 * share
            sample = Sample(at_s=self._at, wait_s=self._wait, step_s=self._step)
            self.workers = self.scaler.decide(self.workers, sample)
            if self.workers != had[-1]:
                had.append(self.workers)
        return had

    def begin_anew(self) -> None:
        """Count from 0 again, as a controller with a new ledger does."""
        self._wait = self._step = 0.0


def test_workers_are_added_while_ranks_wait_up_to_the_bound() -> None:
    ranks = Ranks()
    assert ranks.train(GROW_S - 1, HUNGRY) == [2]
    assert ranks.train(60, HUNGRY) == [2, 3, 4, 6, 8]
    assert ranks.train(600, HUNGRY) == [8]


def test_they_go_one_by_one_after_a_long_calm_down_to_the_bound() -> None:
    ranks = Ranks(least=2, workers=4)
    assert ranks.train(SHRINK_S - 1, CALM) == [4]
    assert ranks.train(SHRINK_S, CALM) == [4, 3]
    assert ranks.train(1000, CALM) == [3, 2]


def test_between_the_thresholds_nothing_changes() -> None:
    assert Ranks().train(10_000, BETWEEN) == [2]


def test_a_worker_that_is_missed_as_soon_as_it_has_gone_makes_the_next_calm_longer() -> None:
    ranks = Ranks(workers=3)
    assert ranks.train(SHRINK_S + 5, CALM) == [3, 2]
    assert ranks.train(GROW_S - 3, HUNGRY) == [2, 3]
    assert ranks.train(SHRINK_S + 5, CALM) == [3], "it has learned"
    assert ranks.train(SHRINK_S, CALM) == [3, 2]


def test_an_operators_change_and_a_new_count_begin_a_new_measurement() -> None:
    ranks = Ranks()
    ranks.train(GROW_S - 2, HUNGRY)
    ranks.workers = 5
    assert ranks.train(GROW_S - 1, HUNGRY) == [5]
    ranks.begin_anew()
    assert ranks.train(GROW_S - 1, HUNGRY) == [5]
    assert ranks.train(3, HUNGRY) == [5, 7]


def test_ranks_that_stand_still_change_nothing() -> None:
    scaler = Autoscaler(least=1, most=8, grow_after_s=GROW_S, shrink_after_s=SHRINK_S)
    for second in range(1000):
        assert scaler.decide(3, Sample(at_s=second, wait_s=1.0, step_s=2.0)) == 3


@given(shares=st.lists(st.floats(0, 1), max_size=40), workers=st.integers(2, 6))
def test_it_stays_within_its_bounds_and_never_flutters(
    shares: Iterable[float], workers: int
) -> None:
    ranks = Ranks(least=2, most=6, workers=workers)
    for share in shares:
        had = ranks.train(GROW_S, share)
        assert all(2 <= count <= 6 for count in had)
        assert len(had) <= 2, "one change a measurement"
