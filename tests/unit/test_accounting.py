"""The accounting finds what was planted, and nothing where nothing was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from deploy.accounting import Account, account_for, check_plans
from deploy.history import Delivery, History, read_deliveries, trained_history, write_digests
from protos.apportion import apportion, no_carry
from protos.errors import DataError
from protos.slots import deal
from protos.types import Mixture, Plan, Step

DOMAINS = ("code", "web")
LANES, GLOBAL_SEQUENCES, NUM_STEPS = 2, 8, 30
SIZES = {"code": (3, 2), "web": (4, 1, 2)}
"""Sequences in each window."""


def content(domain: str, lane: int, epoch: int, window: int, sequence: int) -> str:
    return hashlib.sha256(f"{domain} {lane} {epoch} {window} {sequence}".encode()).hexdigest()


class WrittenOrder:
    """An expected order that is written down above rather than read from shards."""

    def num_windows(self, domain: str, lane: int, epoch: int) -> int:
        return len(SIZES[domain])

    def window(self, domain: str, lane: int, epoch: int, window: int) -> Sequence[str]:
        return [content(domain, lane, epoch, window, i) for i in range(SIZES[domain][window])]


FIRST = Mixture.from_shares((0.3, 0.7))
SECOND = Mixture.from_shares((0.55, 0.45))


def places(domain: str) -> Iterator[tuple[int, int, int]]:
    for epoch in count():
        for window, size in enumerate(SIZES[domain]):
            yield from ((epoch, window, sequence) for sequence in range(size))


def plans_and_deliveries() -> tuple[list[Plan], list[Delivery]]:
    """Deliver 30 steps as they should be, with a change of plan at step 10."""
    order = {(lane, domain): places(domain) for lane in range(LANES) for domain in DOMAINS}
    carry = no_carry(2)
    plans: list[Plan] = []
    deliveries = []
    for step in range(NUM_STEPS):
        mixture = FIRST if step < 10 else SECOND
        if step in (0, 10):
            plans.append(
                Plan(
                    version=len(plans),
                    first_step=Step(step),
                    mixture=mixture,
                    carry_q32=tuple(carry.tolist()),
                )
            )
        counts, carry = apportion(mixture, global_sequences=GLOBAL_SEQUENCES, carry=carry)
        labels = deal(counts, lanes=LANES, seed=0, step=Step(step))
        for slot, label in enumerate(labels.reshape(-1).tolist()):
            lane, domain = slot * LANES // GLOBAL_SEQUENCES, DOMAINS[label]
            epoch, window, sequence = next(order[lane, domain])
            deliveries.append(
                Delivery(
                    generation=1,
                    step=step,
                    slot=slot,
                    lane=lane,
                    domain=domain,
                    epoch=epoch,
                    window=window,
                    sequence=sequence,
                    num_tokens=5,
                    sha256=content(domain, lane, epoch, window, sequence),
                )
            )
    return plans, deliveries


def account(deliveries: list[Delivery]) -> Account:
    history = trained_history(deliveries, global_sequences=GLOBAL_SEQUENCES)
    return account_for(history, WrittenOrder())


def test_a_faultless_run_is_clean() -> None:
    found = account(plans_and_deliveries()[1])
    assert found.clean
    assert found.num_sequences == NUM_STEPS * GLOBAL_SEQUENCES
    assert found.num_lanes_checked == LANES * len(DOMAINS)


def test_a_lost_sequence_is_found() -> None:
    deliveries = plans_and_deliveries()[1]
    gone = deliveries.pop(41)
    found = account(deliveries)
    assert (found.lost, found.duplicated, found.mismatched, found.misordered) == (1, 0, 0, 0)
    assert str(gone.place) in found.faults[0]


def test_a_doubled_sequence_is_found() -> None:
    deliveries = plans_and_deliveries()[1]
    deliveries.append(replace(deliveries[41], step=deliveries[41].step))
    found = account(deliveries)
    assert (found.lost, found.duplicated, found.mismatched, found.misordered) == (0, 1, 0, 0)


def test_a_sequence_read_again_in_place_of_the_next_is_doubled_and_the_next_lost() -> None:
    deliveries = plans_and_deliveries()[1]
    first = next(d for d in deliveries if d.step == 5)
    later = next(
        index
        for index, d in enumerate(deliveries)
        if d.step == 9 and (d.lane, d.domain) == (first.lane, first.domain)
    )
    deliveries[later] = replace(first, step=9, slot=deliveries[later].slot)
    found = account(deliveries)
    assert (found.lost, found.duplicated, found.mismatched) == (1, 1, 0)
    assert found.misordered == 1


def test_a_sequence_with_other_tokens_is_found() -> None:
    deliveries = plans_and_deliveries()[1]
    deliveries[41] = replace(deliveries[41], sha256="0" * 64)
    found = account(deliveries)
    assert (found.lost, found.duplicated, found.mismatched, found.misordered) == (0, 0, 1, 0)


def test_a_place_that_does_not_exist_is_found() -> None:
    deliveries = plans_and_deliveries()[1]
    last = max(i for i, d in enumerate(deliveries) if d.lane == 0 and d.domain == "web")
    deliveries[last] = replace(deliveries[last], window=7)
    assert account(deliveries).mismatched == 1


def test_two_sequences_in_the_wrong_order_are_found() -> None:
    deliveries = plans_and_deliveries()[1]
    one, two = [i for i, d in enumerate(deliveries) if d.lane == 1 and d.domain == "web"][3:5]
    for index, other in ((one, deliveries[two]), (two, deliveries[one])):
        deliveries[index] = replace(other, step=deliveries[index].step, slot=deliveries[index].slot)
    found = account(deliveries)
    assert (found.lost, found.duplicated, found.mismatched, found.misordered) == (0, 0, 0, 1)


def check(deliveries: list[Delivery], plans: list[Plan]) -> tuple[bool, float, tuple[int, ...]]:
    history = trained_history(deliveries, global_sequences=GLOBAL_SEQUENCES)
    found = check_plans(history, plans, domains=DOMAINS, global_sequences=GLOBAL_SEQUENCES)
    assert sum(found.planned_sequences.values()) == GLOBAL_SEQUENCES * len(history.steps)
    return found.plans_obeyed, found.max_share_error_sequences, found.disobeyed_steps


def test_a_run_that_obeys_its_plans_errs_by_less_than_one_sequence() -> None:
    plans, deliveries = plans_and_deliveries()
    obeyed, error, _ = check(deliveries, plans)
    assert obeyed
    assert 0 < error < 1


def test_a_plan_that_is_obeyed_a_step_late_is_found() -> None:
    plans, deliveries = plans_and_deliveries()
    told = [plans[0], replace(plans[1], first_step=Step(9), carry_q32=carry_at(9))]
    obeyed, _, disobeyed = check(deliveries, told)
    assert not obeyed
    assert disobeyed[0] == 9


def carry_at(step: int) -> tuple[int, ...]:
    carry = no_carry(2)
    for _ in range(step):
        carry = apportion(FIRST, global_sequences=GLOBAL_SEQUENCES, carry=carry)[1]
    return tuple(carry.tolist())


def stopped_and_resumed(deliveries: list[Delivery]) -> list[Delivery]:
    before = [d for d in deliveries if d.step < 17]
    after = [replace(d, generation=2) for d in deliveries if d.step >= 12]
    return before + after


def test_what_a_resume_trains_again_replaces_what_was_trained_before() -> None:
    deliveries = plans_and_deliveries()[1]
    history = trained_history(stopped_and_resumed(deliveries), global_sequences=GLOBAL_SEQUENCES)
    assert history.num_superseded == 5 * GLOBAL_SEQUENCES
    assert account_for(history, WrittenOrder()).clean
    assert [d.generation for d in history.deliveries] == [1] * 96 + [2] * 144


def test_a_resume_that_ends_early_leaves_nothing_of_the_abandoned_line() -> None:
    deliveries = plans_and_deliveries()[1]
    resumed = [d for d in stopped_and_resumed(deliveries) if d.generation == 1 or d.step < 14]
    history = trained_history(resumed, global_sequences=GLOBAL_SEQUENCES)
    assert max(history.steps) == 13


def test_a_last_step_that_reached_only_one_rank_is_set_aside() -> None:
    deliveries = plans_and_deliveries()[1]
    half = [d for d in deliveries if d.step < NUM_STEPS - 1 or d.slot < GLOBAL_SEQUENCES // 2]
    history = trained_history(half, global_sequences=GLOBAL_SEQUENCES)
    assert history.unfinished_steps == (NUM_STEPS - 1,)
    assert account_for(history, WrittenOrder()).clean


def write_logs(folder: Path, deliveries: list[Delivery]) -> None:
    names = list(Delivery.__dataclass_fields__)
    for rank in range(2):
        half = GLOBAL_SEQUENCES // 2
        rows = [d for d in deliveries if d.slot // half == rank]
        values = [{name: getattr(d, name) for name in names} for d in rows]
        lines = [json.dumps({**v, "domain": DOMAINS.index(v["domain"])}) + "\n" for v in values]
        (folder / f"received.rank{rank}.jsonl").write_text("".join(lines))


def test_logs_are_read_back_as_they_were_and_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    deliveries = plans_and_deliveries()[1]
    write_logs(tmp_path, deliveries)
    with (tmp_path / "received.rank1.jsonl").open("a") as file:
        file.write('{"generation": 1, "ste')
    read = read_deliveries(tmp_path, DOMAINS)
    assert sorted(read, key=lambda d: (d.step, d.slot)) == deliveries


def spoil_a_line(path: Path) -> None:
    path.write_text("[1]\n" + path.read_text())


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (Path.unlink, "holds no received"),
        (spoil_a_line, r"received\.rank0\.jsonl, line 1: not a line of a delivery log"),
    ],
)
def test_a_log_that_is_not_there_or_damaged_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    write_logs(tmp_path, plans_and_deliveries()[1])
    (tmp_path / "received.rank1.jsonl").unlink()
    spoil(tmp_path / "received.rank0.jsonl")
    with pytest.raises(DataError, match=complaint):
        read_deliveries(tmp_path, DOMAINS)


def test_digests_do_not_tell_a_resumed_run_from_one_that_went_through(tmp_path: Path) -> None:
    deliveries = plans_and_deliveries()[1]

    def digests(rows: list[Delivery], name: str) -> bytes:
        history: History = trained_history(rows, global_sequences=GLOBAL_SEQUENCES)
        assert write_digests(history, tmp_path / name) == NUM_STEPS * GLOBAL_SEQUENCES
        return (tmp_path / name).read_bytes()

    assert digests(deliveries, "one") == digests(stopped_and_resumed(deliveries), "two")
    first = json.loads((tmp_path / "one").read_text().splitlines()[0])
    assert list(first) == ["step", "slot", "domain", "sha256"]
