"""Admission on a real Redis and Postgres: what the door lets in, and what it loads to know it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from producers.admit import Admission, Verdict
from shared import doors, keys
from shared.doors import Door
from shared.errors import UnavailableError
from tests.integration.shopfloor import Shop

HOUR = timedelta(hours=1)


def admission(shop: Shop, engine: AsyncEngine | None = None) -> Admission:
    return Admission(engine or shop.engine, shop.redis, shop.settings)


async def write_doors(shop: Shop, *written: Door) -> None:
    async with shop.redis.pipeline(transaction=False) as pipe:
        doors.queue_write(pipe, written, shop.settings)
        await pipe.execute()


def door(rev: int, within_reach: int) -> Door:
    return Door("sku-1", rev, within_reach, None, None)


async def test_an_item_nobody_has_is_unknown(shop: Shop) -> None:
    assert await admission(shop).admit("shop", "k", "no-such-item", 1) is Verdict.UNKNOWN_ITEM


async def test_an_item_with_stock_is_open(shop: Shop) -> None:
    await shop.item(stock=3)

    assert await admission(shop).admit("shop", "k", "sku-1", 3) is Verdict.OPEN


async def test_more_than_is_within_reach_is_sold_out(shop: Shop) -> None:
    await shop.item(stock=3)

    assert await admission(shop).admit("shop", "k", "sku-1", 4) is Verdict.SOLD_OUT


@pytest.mark.parametrize(("waitlist", "verdict"), [(True, Verdict.OPEN), (False, Verdict.SOLD_OUT)])
async def test_what_is_held_but_not_paid_is_within_reach_of_a_waitlist(
    shop: Shop, waitlist: bool, verdict: Verdict
) -> None:
    await shop.item(stock=3, waitlist=waitlist)
    await shop.hold(shop.order(quantity=3))
    shop.plain_redis.flushall()

    assert await admission(shop).admit("shop", "k-1", "sku-1", 3) is verdict
    assert await admission(shop).admit("shop", "k-2", "sku-1", 4) is Verdict.SOLD_OUT


@pytest.mark.parametrize(
    ("opens", "closes", "verdict"),
    [
        (HOUR, None, Verdict.NOT_ON_SALE),
        (HOUR, 2 * HOUR, Verdict.NOT_ON_SALE),
        (-HOUR, None, Verdict.OPEN),
        (-HOUR, HOUR, Verdict.OPEN),
        (None, HOUR, Verdict.OPEN),
        (None, -HOUR, Verdict.NOT_ON_SALE),
        (-2 * HOUR, -HOUR, Verdict.NOT_ON_SALE),
    ],
)
async def test_an_item_is_open_in_its_hours(
    shop: Shop, opens: timedelta | None, closes: timedelta | None, verdict: Verdict
) -> None:
    now = datetime.now(UTC)
    await shop.item(opens_at=opens and now + opens, closes_at=closes and now + closes)

    assert await admission(shop).admit("shop", "k", "sku-1", 1) is verdict


async def test_a_key_that_was_seen_skips_every_check(shop: Shop) -> None:
    now = datetime.now(UTC)
    await shop.item("closed", closes_at=now - HOUR)
    await shop.item("sold-out", stock=0)
    judge = admission(shop)
    shop.plain_redis.set(keys.seen("shop", "k"), 1)

    for sku in ("closed", "sold-out", "no-such-item"):
        assert await judge.admit("shop", "k", sku, 1_000) is Verdict.KNOWN
    assert await judge.admit("other", "k", "sold-out", 1) is Verdict.SOLD_OUT


async def test_a_retry_while_the_first_try_is_still_being_committed_is_not_refused(shop: Shop) -> None:
    await shop.item(stock=1)
    judge = admission(shop)
    assert await judge.admit("shop", "k", "sku-1", 1) is Verdict.OPEN
    # Its commit is under way; meanwhile somebody else gets the last unit.
    await shop.item(stock=0)
    shop.plain_redis.delete(keys.item("sku-1"))

    assert await judge.admit("shop", "k", "sku-1", 1) is Verdict.KNOWN
    assert await judge.admit("shop", "another", "sku-1", 1) is Verdict.SOLD_OUT
    assert 0 < shop.plain_redis.pttl(keys.seen("shop", "k")) <= shop.settings.key_seen_ttl * 1000


async def test_a_refused_key_is_not_marked(shop: Shop) -> None:
    await shop.item(stock=0)
    assert await admission(shop).admit("shop", "k", "sku-1", 1) is Verdict.SOLD_OUT
    assert shop.plain_redis.exists(keys.seen("shop", "k")) == 0


async def test_a_group_is_answered_request_by_request(shop: Shop) -> None:
    await shop.item("a", stock=5)
    await shop.item("b", stock=0)
    judge = admission(shop)
    wanted = [("a", 5), ("b", 1), ("a", 6), ("no-such-item", 1)]
    verdicts = await asyncio.gather(*(judge.admit("shop", f"k-{n}", *ask) for n, ask in enumerate(wanted)))

    assert verdicts == [Verdict.OPEN, Verdict.SOLD_OUT, Verdict.SOLD_OUT, Verdict.UNKNOWN_ITEM]


async def test_a_missing_door_record_is_loaded_once_for_all_who_wait(shop: Shop) -> None:
    await shop.item(stock=5)
    engine = shop.another_engine()
    statements: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    judge = admission(shop, engine)
    verdicts = await asyncio.gather(*(judge.admit("shop", f"k-{n}", "sku-1", 1) for n in range(200)))

    assert set(verdicts) == {Verdict.OPEN}
    assert len([statement for statement in statements if "fairlane.items" in statement]) == 1
    assert 0 < shop.plain_redis.pttl(keys.item("sku-1")) <= shop.settings.door_ttl * 1000


async def test_an_older_door_record_never_overwrites_a_newer_one(shop: Shop) -> None:
    await write_doors(shop, door(rev=10, within_reach=7))
    await write_doors(shop, door(rev=9, within_reach=100))

    assert shop.plain_redis.hgetall(keys.item("sku-1"))["within_reach"] == "7"
    await write_doors(shop, door(rev=11, within_reach=0))
    assert shop.plain_redis.hgetall(keys.item("sku-1")) == {"rev": "11", "within_reach": "0", "opens": "", "closes": ""}


async def test_the_same_door_record_again_lives_anew(shop: Shop) -> None:
    await write_doors(shop, door(rev=10, within_reach=7))
    shop.plain_redis.pexpire(keys.item("sku-1"), 1_000)
    await write_doors(shop, door(rev=10, within_reach=7))

    assert shop.plain_redis.pttl(keys.item("sku-1")) > 1_000


async def test_without_redis_nobody_is_let_in(shop: Shop) -> None:
    await shop.item()

    with pytest.raises(UnavailableError):
        await Admission(shop.engine, shop.redis_that_is_down(), shop.settings).admit("shop", "k", "sku-1", 1)


async def test_without_postgres_an_unknown_item_cannot_be_told(shop: Shop) -> None:
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))

    with pytest.raises(UnavailableError):
        await admission(shop, nowhere).admit("shop", "k", "sku-1", 1)


async def test_without_postgres_the_door_still_works_by_its_records(shop: Shop) -> None:
    await write_doors(shop, door(rev=1, within_reach=5))
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))

    assert await admission(shop, nowhere).admit("shop", "k", "sku-1", 5) is Verdict.OPEN
