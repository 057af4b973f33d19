from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from controller.guard import Guard, GuardConfig, GuardResult
from protos.apportion import apportion, no_carry
from protos.errors import ConfigError
from protos.types import SHARE_ONE, Mixture
from tests.fakes_policy import make_context

NONE = float("nan")


def guarded(
    proposal: Sequence[float],
    *,
    held: Sequence[float] = (1, 1, 1),
    epochs: Sequence[float] | None = None,
    **settings: Any,
) -> GuardResult:
    guard = Guard(GuardConfig.model_validate(settings), make_context(3, global_sequences=32))
    return guard.apply(proposal, held=Mixture.from_shares(held), delivered_epochs=epochs)


def test_without_bounds_a_proposal_passes() -> None:
    result = guarded((0.5, 0.5, 0.0))
    assert result == GuardResult(mixture=Mixture.from_shares((0.5, 0.5, 0)))


def test_a_floor_takes_from_the_others_in_proportion() -> None:
    result = guarded((0.6, 0.4, 0.0), min_share=0.1)
    assert result.mixture.shares == pytest.approx((0.54, 0.36, 0.1))
    assert result.reasons == ("min_share: raised domain-2",)
    assert not result.held


def test_a_floor_is_not_undone_by_scaling() -> None:
    # Clipping to 0.2 and dividing by the sum would leave 0.2 / 1.3.
    assert min(guarded((0.9, 0.05, 0.05), min_share=0.2).mixture.shares) >= 0.2


def test_the_least_number_of_sequences_is_delivered_in_every_step() -> None:
    mixture = guarded((1.0, 0.0, 0.0), min_sequences=3).mixture
    carry = no_carry(3)
    for _ in range(200):
        counts, carry = apportion(mixture, global_sequences=32, carry=carry)
        assert counts.min() >= 3


def test_a_ceiling_gives_the_rest_to_the_others_in_proportion() -> None:
    result = guarded((0.9, 0.08, 0.02), max_share=0.5)
    assert result.mixture.shares == pytest.approx((0.5, 0.4, 0.1))
    assert result.reasons == ("max_share: lowered domain-0",)


def test_a_domain_with_a_share_of_0_gets_some_only_if_the_others_are_full() -> None:
    assert guarded((0.8, 0.2, 0.0), max_share=0.5).mixture.shares == pytest.approx((0.5, 0.5, 0))
    assert guarded((1.0, 0.0, 0.0), max_share=0.5).mixture.shares == pytest.approx(
        (0.5, 0.25, 0.25)
    )


def test_a_change_is_limited_share_by_share() -> None:
    result = guarded((1.0, 0.0, 0.0), held=(0.4, 0.3, 0.3), max_change=0.1)
    assert result.mixture.shares == pytest.approx((0.5, 0.25, 0.25))
    assert result.reasons == ("max_change: held back domain-0",)


def test_a_domain_read_often_enough_gets_nothing_more() -> None:
    result = guarded((0.5, 0.3, 0.2), epochs=(2.0, 1.9, 0.1), max_epochs=2, min_share=0.1)
    assert result.mixture.shares == pytest.approx((0.0, 0.6, 0.4))
    assert result.reasons == ("max_epochs: no more of domain-0",)


def test_when_all_domains_are_read_often_enough_none_is_cut() -> None:
    result = guarded((0.5, 0.3, 0.2), epochs=(3, 3, 3), max_epochs=2)
    assert result.mixture.shares == pytest.approx((0.5, 0.3, 0.2))
    assert "all domains" in result.reasons[0]


def test_a_domain_read_to_its_end_stops_at_once_whatever_change_is_allowed() -> None:
    result = guarded((0.5, 0.25, 0.25), epochs=(3, 0, 0), max_epochs=2, max_change=0.01)
    assert result.mixture.shares[0] == 0
    assert any(reason.startswith("max_change: widened") for reason in result.reasons)


def test_a_ceiling_gives_way_where_too_few_domains_are_left() -> None:
    result = guarded((0.5, 0.3, 0.2), epochs=(3, 3, 0), max_epochs=2, max_share=0.5)
    assert result.mixture.shares == pytest.approx((0, 0, 1))
    assert any(reason.startswith("max_share: given up") for reason in result.reasons)


@pytest.mark.parametrize(
    ("proposal", "fault"),
    [
        ((NONE, 0.5, 0.5), "not finite"),
        ((float("inf"), 0, 0), "not finite"),
        ((1.1, -0.1, 0.0), "negative"),
        ((0.5, 0.5), r"shape \(2,\) for 3 domains"),
        ((0.5, 0.4, 0.0), "add up to 0.9"),
    ],
)
def test_a_proposal_that_is_no_mixture_holds_the_one_in_force(
    proposal: Sequence[float], fault: str
) -> None:
    result = guarded(proposal, held=(0.2, 0.3, 0.5), min_share=0.1, max_change=0.1)
    assert result.held
    assert result.mixture == Mixture.from_shares((0.2, 0.3, 0.5))
    assert len(result.reasons) == 1
    assert re.search(f"^hold: .*{fault}", result.reasons[0])


def test_the_loop_can_hold_for_reasons_of_its_own() -> None:
    held = Mixture.uniform(2)
    result = Guard.hold(held, "the policy took 3.1 s of 2.0 s")
    assert result == GuardResult(
        mixture=held, reasons=("hold: the policy took 3.1 s of 2.0 s",), held=True
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"min_share": 0.4}, r"share of 0.4 for each of 3 domains, more than there is"),
        ({"min_sequences": 11}, r"share of 0.34375 for each of 3 domains"),
        ({"max_share": 0.3}, r"guard.max_share 0.3 leaves a part .* raise it to 0.3333 or more"),
    ],
)
def test_bounds_that_no_mixture_obeys_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        guarded((1, 0, 0), **settings)


def test_a_floor_above_the_ceiling_is_refused() -> None:
    config = GuardConfig(min_share=0.6, max_share=0.5)
    with pytest.raises(ConfigError, match=r"of 0.6, more than guard.max_share 0.5"):
        Guard(config, make_context(1))


def test_bounds_that_only_one_mixture_obeys_give_that_one() -> None:
    one_mixture: list[dict[str, Any]] = [{"min_share": 1 / 3}, {"max_share": 1 / 3}]
    for settings in one_mixture:
        shares = guarded((1.0, 0.0, 0.0), **settings).mixture.shares_q32
        assert max(shares) - min(shares) <= 1
        assert sum(shares) == SHARE_ONE
