"""What the provider's records mean for a purchase in doubt."""

from __future__ import annotations

import pytest

from shared.settings import NotChargedPolicy, Settings
from workers.gateways import ChargeRecord, Confirmed, Declined
from workers.reconcile import Answer, Postponed, judge
from workers.record import NeedsReview, NotCharged

SUCCEEDED, DECLINED = ChargeRecord("ch_1", "succeeded"), ChargeRecord("ch_0", "declined")
SETTINGS = Settings(database_url="postgresql://h/d", redis_url="redis://h")


def judged(
    records: list[ChargeRecord] | None,
    doubted: float = 100,
    settles_in: float = -1,
    charged_in_vain: int = 0,
    settings: Settings = SETTINGS,
) -> Answer:
    return judge(records, doubted=doubted, settles_in=settles_in, charged_in_vain=charged_in_vain, settings=settings)


@pytest.mark.parametrize("settles_in", [50, -1])
def test_a_charge_that_is_there_counts_at_once(settles_in: float) -> None:
    assert judged([SUCCEEDED], settles_in=settles_in) == Confirmed("ch_1")
    assert judged([DECLINED, SUCCEEDED], settles_in=settles_in) == Confirmed("ch_1")
    assert judged([DECLINED], settles_in=settles_in) == Declined("declined", "ch_0")


def test_two_charges_are_for_an_operator() -> None:
    assert judged([SUCCEEDED, ChargeRecord("ch_2", "succeeded")]) == NeedsReview("charged_twice")


def test_not_found_means_nothing_before_the_settle_window_is_over() -> None:
    assert isinstance(judged([], settles_in=0.001), Postponed)
    assert judged([], settles_in=0) == NotCharged(again=True)


def test_it_is_asked_again_when_the_settle_window_ends() -> None:
    answer = judged([], doubted=100, settles_in=7)
    assert answer == Postponed(7)


def test_another_attempt_until_the_limit_and_then_declined() -> None:
    again = [judged([], charged_in_vain=before) for before in range(SETTINGS.never_charged_limit)]
    assert again == [NotCharged(again=True)] * 4 + [NotCharged(again=False)]


def test_a_shop_may_decline_at_once() -> None:
    at_once = SETTINGS.model_copy(update={"not_charged": NotChargedPolicy.DECLINE})
    assert judged([], settings=at_once) == NotCharged(again=False)


@pytest.mark.parametrize("records", [None, [ChargeRecord("ch_1", "pending")]])
def test_patience_has_an_end(records: list[ChargeRecord] | None) -> None:
    assert isinstance(judged(records, doubted=3_599), Postponed)
    assert isinstance(judged(records, doubted=3_600), NeedsReview)


def test_it_asks_often_at_first_and_once_a_minute_at_last() -> None:
    assert judged(None, doubted=0.1) == Postponed(1.0)
    assert judged(None, doubted=20) == Postponed(10.0)
    assert judged(None, doubted=1_000) == Postponed(60.0)
