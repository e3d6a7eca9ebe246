"""An item is changed while it is sold, over HTTP: more stock, less stock, an early end, a beginning in the future."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from shared.purchases import rfc3339
from shared.routing import lane_of, queue_of
from tests.integration.http_calls import ADMIN, SHOP, Answer, assert_problem, call
from tests.integration.serving import serving
from tests.integration.shopfloor import ScriptedGateway, Shop, until

TERMS: dict[str, Any] = {"name": "Tee", "price": 500, "currency": "EUR"}
HOUR = timedelta(hours=1)


class Sale:
    """One item, its API, and the workers' work when a test wants it done."""

    def __init__(self, api: str, shop: Shop) -> None:
        self.api = api
        self._shop = shop
        self._lane = lane_of("sku-1", shop.settings.lanes)

    async def put(self, stock: int, **terms: Any) -> Answer:
        """The admin sets the item's terms."""
        return await call("PUT", f"{self.api}/v1/items/sku-1", ADMIN, TERMS | {"stock": stock} | terms)

    async def item(self) -> dict[str, Any]:
        found: dict[str, Any] = (await call("GET", f"{self.api}/v1/items/sku-1", SHOP)).json
        return found

    async def buy(self, quantity: int = 1) -> Answer:
        key = uuid4().hex
        body = {"item": "sku-1", "quantity": quantity, "customer": key, "payment_token": "tok_visa"}
        answer = await call("POST", f"{self.api}/v1/purchases", SHOP | {"Idempotency-Key": key}, body)
        if answer.status == 202:
            # The lane is called in the background.
            await until(lambda: bool(self._shop.messages(queue_of(self._lane))))
        return answer

    async def decide(self) -> None:
        """A worker answers the calls there are for the lane; with none, nothing happens."""
        while self._shop.messages(queue_of(self._lane)):
            self._shop.plain_redis.delete(queue_of(self._lane))
            with self._shop.decider() as decider:
                await asyncio.to_thread(decider.drain, self._lane)

    async def pay(self) -> None:
        await self._shop.charger(ScriptedGateway()).drain()

    async def statuses(self, *bought: Answer) -> list[str]:
        """How these purchases stand, as their client sees it."""
        shown = [await call("GET", f"{self.api}{each.headers['Location']}", SHOP) for each in bought]
        return [each.json["status"] for each in shown]


@pytest.fixture
async def sale(shop: Shop) -> AsyncIterator[Sale]:
    async with serving(shop.settings, subscribed=False) as api:
        yield Sale(api.url, shop)


async def test_more_stock_goes_to_those_who_wait_and_then_to_newcomers(sale: Sale) -> None:
    await sale.put(2)
    holder = await sale.buy(2)
    await sale.decide()
    # Two units are within reach as long as the holder has not paid.
    bought = [holder, await sale.buy(), await sale.buy()]
    await sale.decide()
    assert await sale.statuses(*bought) == ["reserved", "waitlisted", "waitlisted"]

    changed = await sale.put(3)
    assert (changed.status, changed.json["available"], changed.json["held"]) == (200, 1, 2)
    await sale.decide()
    assert await sale.statuses(*bought) == ["reserved", "reserved", "waitlisted"]
    await sale.put(5)
    await sale.decide()
    newcomer = await sale.buy()
    await sale.decide()
    assert await sale.statuses(*bought, newcomer) == ["reserved"] * 4
    assert await sale.item() == await sale.item() | {"stock": 5, "available": 0, "held": 5, "sold": 0}


async def test_stock_that_is_taken_away_is_never_what_is_held_or_sold(sale: Sale) -> None:
    await sale.put(10)
    sold = await sale.buy(3)
    await sale.decide()
    await sale.pay()
    held = await sale.buy(2)
    await sale.decide()
    assert await sale.item() == await sale.item() | {"available": 5, "held": 2, "sold": 3}

    assert_problem(await sale.put(4), 409, "stock-below-committed")
    assert (await sale.item())["stock"] == 10
    least = await sale.put(5)
    assert (least.status, least.json["available"]) == (200, 0)
    late = await sale.buy(3)
    assert_problem(late, 409, "sold-out")
    await sale.pay()
    assert await sale.statuses(sold, held) == ["confirmed", "confirmed"]
    assert await sale.item() == await sale.item() | {"stock": 5, "available": 0, "held": 0, "sold": 5}


async def test_who_waited_for_stock_that_was_taken_away_is_told(sale: Sale) -> None:
    await sale.put(3)
    holder = await sale.buy(2)
    await sale.decide()
    waiting = await sale.buy(3)
    await sale.decide()
    assert await sale.statuses(holder, waiting) == ["reserved", "waitlisted"]
    await sale.put(2)
    await sale.decide()
    assert await sale.statuses(holder, waiting) == ["reserved", "sold_out"]


async def test_an_item_that_is_closed_early(sale: Sale) -> None:
    opened = rfc3339(datetime.now(UTC) - HOUR)
    await sale.put(5, opens_at=opened)
    paid_later = await sale.buy()
    await sale.decide()
    accepted_in_time = await sale.buy()
    closed = rfc3339(datetime.now(UTC))
    changed = await sale.put(5, opens_at=opened, closes_at=closed)
    assert (changed.status, changed.json["closes_at"]) == (200, closed)

    assert_problem(await sale.buy(), 409, "not-on-sale")
    await sale.decide()
    assert await sale.statuses(paid_later, accepted_in_time) == ["reserved", "reserved"]
    await sale.pay()
    assert await sale.statuses(paid_later, accepted_in_time) == ["confirmed", "confirmed"]


async def test_an_item_that_is_closed_as_of_earlier(sale: Sale) -> None:
    """What was accepted after that moment is no longer sold, unless it has its stock already."""
    opened = rfc3339(datetime.now(UTC) - 2 * HOUR)
    await sale.put(5, opens_at=opened)
    reserved = await sale.buy()
    await sale.decide()
    queued = await sale.buy()
    await sale.put(5, opens_at=opened, closes_at=rfc3339(datetime.now(UTC) - HOUR))

    assert_problem(await sale.buy(), 409, "not-on-sale")
    await sale.decide()
    await sale.pay()
    assert await sale.statuses(reserved, queued) == ["confirmed", "cancelled"]
    shown = await call("GET", f"{sale.api}{queued.headers['Location']}", SHOP)
    assert shown.json["reason"] == "not_on_sale"
    assert await sale.item() == await sale.item() | {"available": 4, "held": 0, "sold": 1}


async def test_opening_hours_are_kept_and_can_be_changed(sale: Sale) -> None:
    tomorrow = rfc3339(datetime.now(UTC) + 24 * HOUR)
    await sale.put(5, opens_at=tomorrow)
    assert_problem(await sale.buy(), 409, "not-on-sale")
    await sale.put(5, opens_at=rfc3339(datetime.now(UTC) - HOUR), closes_at=tomorrow)
    early = await sale.buy()
    assert early.status == 202
    await sale.decide()
    assert await sale.statuses(early) == ["reserved"]
    await sale.put(5, opens_at=tomorrow)
    assert_problem(await sale.buy(), 409, "not-on-sale")
