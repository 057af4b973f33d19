"""Whole epochs are held against the index, and what is wrong with one is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from deploy.epochs import Document, EpochAccount, account_for_epochs
from deploy.history import Delivery, trained_history
from tests.unit.test_accounting import (
    DOMAINS,
    GLOBAL_SEQUENCES,
    LANES,
    SIZES,
    WrittenOrder,
    plans_and_deliveries,
)

_TOKENS = 5
"""That count in each sequence delivered."""


class WrittenContents(WrittenOrder):
    """A document and a short one in each window."""

    def __init__(
        self, *, added: Sequence[Document] = (), left_out: Sequence[Document] = ()
    ) -> None:
        self._added, self._left_out = Counter(added), Counter(left_out)

    @property
    def lanes(self) -> int:
        return LANES

    def num_added(self, documents: Sequence[Document], num_sequences: int) -> int:
        # A separator, and the first tokens of all sequences but one.
        return 1 + num_sequences - 1

    def documents(self, domain: str, lane: int, epoch: int, window: int) -> Sequence[Document]:
        num_tokens = (_TOKENS - 1) * SIZES[domain][window] + 1
        # A separator stands between the two.
        return [Document("short", 1), Document(f"{domain} {lane} {window}", num_tokens - 2)]

    def all_documents(self, domain: str) -> Iterable[Document]:
        found = Counter(
            document
            for lane in range(LANES)
            for window in range(len(SIZES[domain]))
            for document in self.documents(domain, lane, 0, window)
        )
        return (found + self._added - self._left_out).elements()


def account(
    deliveries: list[Delivery], contents: WrittenContents | None = None
) -> list[EpochAccount]:
    history = trained_history(deliveries, global_sequences=GLOBAL_SEQUENCES)
    return account_for_epochs(history, contents or WrittenContents())


def test_complete_epochs_of_a_faultless_run_are_exact_and_open_ones_are_not_judged() -> None:
    deliveries = plans_and_deliveries()[1]
    found = account(deliveries)
    assert all(each.exact for each in found)
    for domain in DOMAINS:
        by_lane = Counter(one.lane for one in deliveries if one.domain == domain)
        epochs = [each.epoch for each in found if each.domain == domain]
        assert epochs == list(range(min(by_lane.values()) // sum(SIZES[domain])))
        assert len(epochs) > 2


def test_an_epoch_is_judged_when_the_last_lane_has_ended_it() -> None:
    deliveries = [one for one in plans_and_deliveries()[1] if one.domain == "web"]
    ends = [
        max(i for i, one in enumerate(deliveries) if one.lane == lane and one.epoch == 0)
        for lane in range(LANES)
    ]
    assert ends[0] != ends[1]
    for end, expected in ((max(ends), 0), (max(ends) + 1, 1)):
        # So few sequences a step that no step of these counts as unfinished.
        history = trained_history(deliveries[:end], global_sequences=1)
        assert len(account_for_epochs(history, WrittenContents())) == expected


def only_fault(found: list[EpochAccount]) -> EpochAccount:
    (fault,) = [each for each in found if not each.exact]
    return fault


def test_what_is_lost_or_changed_is_missing_in_its_epoch() -> None:
    deliveries = plans_and_deliveries()[1]
    gone = deliveries[41]
    changed = [*deliveries[:41], replace(gone, sha256="0" * 64), *deliveries[42:]]
    for faulty in ([*deliveries[:41], *deliveries[42:]], changed):
        fault = only_fault(account(faulty))
        assert (fault.domain, fault.epoch) == (gone.domain, gone.epoch)
        assert (fault.missing, fault.extra) == (2, 0)
        assert fault.num_tokens - fault.tokens_delivered == _TOKENS - 1
        assert f"{gone.domain}, epoch {gone.epoch}: 2 documents missing" in fault.fault()


def test_a_window_that_came_twice_is_too_much() -> None:
    deliveries = plans_and_deliveries()[1]
    web = [one for one in deliveries if (one.domain, one.lane, one.epoch) == ("web", 0, 1)]
    twice = [one for one in web if one.window == 1]
    fault = only_fault(account([*deliveries, *twice]))
    assert (fault.domain, fault.epoch, fault.missing, fault.extra) == ("web", 1, 0, 2)


def test_a_mask_that_hides_a_token_is_found() -> None:
    deliveries = plans_and_deliveries()[1]
    deliveries[41] = replace(deliveries[41], num_tokens=_TOKENS - 1)
    fault = only_fault(account(deliveries))
    assert (fault.missing, fault.extra) == (0, 0)
    assert fault.tokens_delivered == fault.num_tokens - 1


def test_an_order_that_leaves_a_document_out_or_has_it_twice_is_found() -> None:
    deliveries = plans_and_deliveries()[1]
    for each in account(deliveries, WrittenContents(added=[Document("never read", 3)])):
        assert (each.missing, each.extra) == (1, 0)
    for each in account(deliveries, WrittenContents(left_out=[Document("short", 1)])):
        assert (each.missing, each.extra) == (0, 1)
