"""Clocks that are wrong or differ: whose word counts for what."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from producers.admit import Admission, Verdict
from shared import keys
from tests.integration.shopfloor import ScriptedGateway, Shop, knock
from workers.gateways import Confirmed, InDoubt

A_DAY = 86_400.0
A_WHILE = timedelta(minutes=5)


@pytest.mark.parametrize("wrong_by", [-A_DAY, A_DAY], ids=["a day behind", "a day ahead"])
async def test_a_workers_wall_clock_changes_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, wrong_by: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + wrong_by)
    await shop.item(opens_at=datetime.now(UTC) - A_WHILE, closes_at=datetime.now(UTC) + A_WHILE, hold_seconds=60)
    gateway = ScriptedGateway(Confirmed("ch_1"))

    paid, doubted = await shop.hold(shop.order(), shop.order())
    shop.sql("UPDATE fairlane.purchases SET due_at = now() + interval '1 hour' WHERE id = %s", doubted.id)
    await shop.charger(gateway).drain()
    shop.sql("UPDATE fairlane.purchases SET due_at = now() WHERE id = %s", doubted.id)
    await shop.charger(ScriptedGateway(InDoubt("timeout"))).drain()
    swept = await shop.sweep().run_once()

    # Neither was the call too late to be sent, nor has a hold, a deadline or the sale come to its end.
    assert (shop.status(paid), shop.status(doubted)) == ("confirmed", "in_doubt")
    assert gateway.references == [paid.id]
    assert (swept.expired, swept.in_doubt) == ((), ())
    (database,) = shop.sql("SELECT now() AS now")
    row = shop.purchase(paid)
    times = [row["accepted_at"], row["decided_at"], row["finished_at"]]
    times += [attempt["recorded_at"] for attempt in shop.attempts()]
    assert all(abs(database["now"] - moment) < A_WHILE for moment in times)


async def test_redis_that_is_behind_refuses_at_an_opening_and_nothing_more(shop: Shop) -> None:
    """The door compares with Redis' clock. Seen from there, the sale of this item opens in five minutes."""
    opened = datetime.now(UTC) - A_WHILE
    await shop.item(opens_at=opened)
    admission = Admission(shop.engine, shop.redis, shop.settings)
    assert await knock(admission, "key-1") is Verdict.OPEN  # and the record is there
    in_its_future = int((opened + 2 * A_WHILE).timestamp() * 1000)
    shop.plain_redis.hset(keys.item("sku-1"), "opens", in_its_future)

    assert await knock(admission, "key-2") is Verdict.NOT_ON_SALE
    # Who was let in is decided by Postgres' clock alone.
    (bought,) = await shop.hold(shop.order(key="key-1"))
    assert shop.status(bought) == "reserved"


async def test_redis_that_is_ahead_lets_in_early_and_postgres_calls_it_off(shop: Shop) -> None:
    await shop.item(opens_at=datetime.now(UTC) + A_WHILE)
    admission = Admission(shop.engine, shop.redis, shop.settings)
    assert await knock(admission, "key-1") is Verdict.NOT_ON_SALE
    shop.plain_redis.hset(keys.item("sku-1"), "opens", int(datetime.now(UTC).timestamp() * 1000) - 1)

    assert await knock(admission, "key-1") is Verdict.OPEN
    (bought,) = await shop.hold(shop.order(key="key-1"))
    assert (shop.status(bought), shop.purchase(bought)["reason"]) == ("cancelled", "not_on_sale")
    assert shop.stock() == (10, 0, 0)
