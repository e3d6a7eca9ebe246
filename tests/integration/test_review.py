"""What an operator settles, and what is refused because the provider's books say otherwise."""

from __future__ import annotations

import pytest

from ops.review import Review, ReviewError
from shared.purchases import PurchaseRecord
from tests.integration.shopfloor import ScriptedGateway, Shop
from workers.gateways import ChargeRecord, InDoubt
from workers.record import NeedsReview, Result


@pytest.fixture
def provider() -> ScriptedGateway:
    gateway = ScriptedGateway()
    gateway.records = {}
    return gateway


@pytest.fixture
def review(shop: Shop, provider: ScriptedGateway) -> Review:
    return Review(shop.engine, shop.redis, provider, shop.settings)


async def in_review(shop: Shop) -> PurchaseRecord:
    """One of two units held for a purchase of which nobody knows whether it was paid; another buyer waits."""
    await shop.item(stock=1)
    held, _ = await shop.hold(shop.order(), shop.order())
    (claim,) = await shop.claim()
    for outcome in (InDoubt("timeout"), NeedsReview("provider_silent")):
        result = Result(held.id, claim.fence, claim.attempt, claim.lock, outcome)
        assert await shop.recorder().record([result])
    assert shop.status(held) == "needs_review"
    return held


async def test_it_is_listed_with_what_the_provider_has(shop: Shop, review: Review, provider: ScriptedGateway) -> None:
    held = await in_review(shop)
    provider.records = {held.id: [ChargeRecord("ch_1", "succeeded")]}
    (found,) = await review.waiting()
    assert (found.record.id, found.record.reason, found.succeeded) == (held.id, "provider_silent", ["ch_1"])

    provider.records = None
    assert [each.charges for each in await review.waiting()] == [None]


async def test_a_charge_on_the_books_confirms_it(shop: Shop, review: Review, provider: ScriptedGateway) -> None:
    held = await in_review(shop)
    provider.records = {held.id: [ChargeRecord("ch_1", "succeeded"), ChargeRecord("ch_2", "succeeded")]}
    await review.confirm(held.id, "ch_2")

    row = shop.purchase(held)
    assert (row["status"], row["charge_id"], row["payment_token"]) == ("confirmed", "ch_2", None)
    assert shop.stock() == (0, 0, 1)
    assert await review.waiting() == []


async def test_no_charge_on_the_books_declines_it_and_its_unit_goes_to_the_next(
    shop: Shop, review: Review, provider: ScriptedGateway
) -> None:
    held = await in_review(shop)
    lane = shop.purchase(held)["lane"]
    shop.forget_calls()
    provider.records = {held.id: [ChargeRecord("ch_1", "declined")]}
    await review.decline(held.id)

    assert (shop.status(held), shop.purchase(held)["reason"]) == ("declined", "declined_by_operator")
    assert shop.stock() == (1, 0, 0)
    assert len(shop.messages(f"lane.{lane:02d}")) == 1


@pytest.mark.parametrize(
    ("records", "said"),
    [([], "none"), ([ChargeRecord("ch_9", "succeeded")], "ch_9"), ([ChargeRecord("ch_1", "declined")], "none")],
)
async def test_a_charge_that_is_not_on_the_books_confirms_nothing(
    shop: Shop, review: Review, provider: ScriptedGateway, records: list[ChargeRecord], said: str
) -> None:
    held = await in_review(shop)
    provider.records = {held.id: records}
    with pytest.raises(ReviewError, match=f"it has {said}"):
        await review.confirm(held.id, "ch_1")
    assert shop.status(held) == "needs_review"


async def test_what_was_charged_or_may_have_been_is_not_declined(
    shop: Shop, review: Review, provider: ScriptedGateway
) -> None:
    held = await in_review(shop)
    provider.records = {held.id: [ChargeRecord("ch_1", "succeeded")]}
    with pytest.raises(ReviewError, match="ch_1"):
        await review.decline(held.id)
    provider.records = None
    with pytest.raises(ReviewError, match="does not say"):
        await review.decline(held.id)
    assert shop.status(held) == "needs_review"
    assert shop.stock() == (0, 1, 0)


async def test_what_was_set_aside_before_its_decision_is_declined_and_holds_nothing(shop: Shop, review: Review) -> None:
    await shop.item(stock=1)
    (aside,) = await shop.buy(shop.order())
    shop.sql("UPDATE fairlane.purchases SET status = 'needs_review', reason = 'undecidable', rev = rev + 1")
    with pytest.raises(ReviewError, match="no succeeded charge"):
        await review.confirm(aside.id, "ch_1")
    await review.decline(aside.id)

    row = shop.purchase(aside)
    assert (row["status"], row["payment_token"], row["finished_at"] is None) == ("declined", None, False)
    assert shop.stock() == (1, 0, 0)


async def test_what_is_not_in_review_is_left_alone(shop: Shop, review: Review) -> None:
    await shop.item()
    (held,) = await shop.hold(shop.order())
    with pytest.raises(ReviewError, match="not in review"):
        await review.decline(held.id)
    with pytest.raises(ReviewError, match="not in review"):
        await review.confirm(held.id, "ch_1")
    assert shop.status(held) == "reserved"
