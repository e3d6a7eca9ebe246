"""Admission on a real Redis and Postgres: what the door lets in, and what it loads to know it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

from producers.admit import Admission, Verdict
from shared import doors, keys
from shared.doors import Door
from shared.errors import UnavailableError
from tests.integration.shopfloor import BOUND, Shop, knock, until

HOUR = timedelta(hours=1)


def admission(shop: Shop, engine: AsyncEngine | None = None) -> Admission:
    return Admission(engine or shop.engine, shop.redis, shop.settings)


async def write_doors(shop: Shop, *written: Door) -> None:
    async with shop.redis.pipeline(transaction=False) as pipe:
        doors.queue_write(pipe, written, shop.settings)
        await pipe.execute()


def door(rev: int, within_reach: int) -> Door:
    return Door("sku-1", rev, within_reach, within_reach, None, None)


async def test_an_item_nobody_has_is_unknown(shop: Shop) -> None:
    assert await knock(admission(shop), "k", "no-such-item", 1) is Verdict.UNKNOWN_ITEM


async def test_an_item_with_stock_is_open(shop: Shop) -> None:
    await shop.item(stock=3)

    assert await knock(admission(shop), "k", "sku-1", 3) is Verdict.OPEN


async def test_more_than_is_within_reach_is_sold_out(shop: Shop) -> None:
    await shop.item(stock=3)

    assert await knock(admission(shop), "k", "sku-1", 4) is Verdict.SOLD_OUT


@pytest.mark.parametrize(("waitlist", "verdict"), [(True, Verdict.OPEN), (False, Verdict.SOLD_OUT)])
async def test_what_is_held_but_not_paid_is_within_reach_of_a_waitlist(
    shop: Shop, waitlist: bool, verdict: Verdict
) -> None:
    await shop.item(stock=3, waitlist=waitlist)
    await shop.hold(shop.order(quantity=3))
    shop.plain_redis.flushall()

    assert await knock(admission(shop), "k-1", "sku-1", 3) is verdict
    assert await knock(admission(shop), "k-2", "sku-1", 4) is Verdict.SOLD_OUT


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

    assert await knock(admission(shop), "k") is verdict


async def test_a_key_that_was_seen_skips_every_check(shop: Shop) -> None:
    now = datetime.now(UTC)
    await shop.item("closed", closes_at=now - HOUR)
    await shop.item("sold-out", stock=0)
    judge = admission(shop)
    shop.plain_redis.set(keys.seen("shop", "k"), 1)

    for sku in ("closed", "sold-out", "no-such-item"):
        assert await knock(judge, "k", sku, 1_000) is Verdict.KNOWN
    assert await knock(judge, "k", "sold-out", client="other") is Verdict.SOLD_OUT


async def test_a_retry_while_the_first_try_is_still_being_committed_is_not_refused(shop: Shop) -> None:
    await shop.item(stock=1)
    judge = admission(shop)
    assert await knock(judge, "k") is Verdict.OPEN
    # Its commit is under way; meanwhile somebody else gets the last unit.
    await shop.item(stock=0)
    shop.plain_redis.delete(keys.item("sku-1"))

    assert await knock(judge, "k") is Verdict.KNOWN
    assert await knock(judge, "another") is Verdict.SOLD_OUT
    assert 0 < shop.plain_redis.pttl(keys.seen("shop", "k")) <= shop.settings.key_seen_ttl * 1000


async def test_a_refused_key_is_not_marked(shop: Shop) -> None:
    await shop.item(stock=0)
    assert await knock(admission(shop), "k") is Verdict.SOLD_OUT
    assert shop.plain_redis.exists(keys.seen("shop", "k")) == 0


async def test_a_group_is_answered_request_by_request(shop: Shop) -> None:
    await shop.item("a", stock=5)
    await shop.item("b", stock=0)
    judge = admission(shop)
    wanted = [("a", 5), ("b", 1), ("a", 6), ("no-such-item", 1)]
    verdicts = await asyncio.gather(*(knock(judge, f"k-{n}", *ask) for n, ask in enumerate(wanted)))

    assert verdicts == [Verdict.OPEN, Verdict.SOLD_OUT, Verdict.SOLD_OUT, Verdict.UNKNOWN_ITEM]


async def test_who_comes_alone_for_an_item_that_must_be_loaded_waits_for_no_beat(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knocks three times: before its door record is there, before its count is, and then."""
    monkeypatch.setattr("producers.admit._KNOCKS_EVERY", 600.0)
    await shop.item(stock=5)
    async with asyncio.timeout(30):
        assert await knock(admission(shop), "k-1") is Verdict.OPEN


async def test_a_missing_door_record_is_loaded_once_for_all_who_wait(shop: Shop) -> None:
    await shop.item(stock=200)
    engine = shop.another_engine()
    statements: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    judge = admission(shop, engine)
    verdicts = await asyncio.gather(*(knock(judge, f"k-{n}") for n in range(200)))

    assert set(verdicts) == {Verdict.OPEN}
    # The door record, and the count.
    assert ["fairlane.purchases" in statement for statement in statements if "fairlane.items" in statement] == [
        False,
        True,
    ]
    assert 0 < shop.plain_redis.pttl(keys.item("sku-1")) <= shop.settings.door_ttl * 1000


async def test_who_asks_for_an_item_joins_no_load_that_began_before_it_existed(shop: Shop) -> None:
    engine = shop.another_engine()
    read, go_on = asyncio.Event(), asyncio.Event()

    def hold(*_: object) -> None:
        """The first answer of Postgres is on its way for long."""
        if not read.is_set():
            read.set()
            await_only(go_on.wait())

    event.listen(engine.sync_engine, "after_cursor_execute", hold)
    judge = admission(shop, engine)

    def judged() -> int:
        return int(shop.plain_redis.info("commandstats")["cmdstat_eval"]["calls"])

    first = asyncio.create_task(knock(judge, "first"))
    await read.wait()
    await shop.item()
    before = judged()
    second = asyncio.create_task(knock(judge, "second"))
    await until(lambda: judged() > before)
    go_on.set()
    assert await second is Verdict.OPEN
    assert await first is Verdict.UNKNOWN_ITEM


async def test_a_count_that_takes_long_delays_no_other_item(shop: Shop) -> None:
    await shop.item("hot")
    await shop.item("other")
    shop.plain_redis.set(keys.waiting("other"), 0)
    patient = shop.with_settings(lock_timeout=60, statement_timeout=60, connection_timeout=90)
    judge = Admission(shop.another_engine(patient), shop.redis, patient)
    with shop.holding("LOCK TABLE fairlane.purchases IN ACCESS EXCLUSIVE MODE"):
        counting = asyncio.create_task(knock(judge, "k-1", "hot"))
        await shop.someone_waits_for_a_lock()
        # Only its door record is missing, and that is read without a look at purchases.
        assert await asyncio.wait_for(knock(judge, "k-2", "other"), BOUND) is Verdict.OPEN
        assert not counting.done()
    assert await counting is Verdict.OPEN


async def test_a_count_has_the_limits_of_every_transaction(shop: Shop) -> None:
    await shop.item()
    settings = shop.with_settings(lock_timeout=0.2, connection_timeout=60)
    judge = Admission(shop.another_engine(settings), shop.redis, settings)
    with (
        shop.holding("LOCK TABLE fairlane.purchases IN ACCESS EXCLUSIVE MODE"),
        pytest.raises(UnavailableError),
    ):
        await asyncio.wait_for(knock(judge, "k"), BOUND)


async def test_what_is_lost_again_while_it_is_loaded_is_loaded_again(shop: Shop) -> None:
    await shop.item()
    engine = shop.another_engine()
    loads: list[str] = []

    def lose(*args: Any) -> None:
        if "fairlane.items" in args[2]:
            loads.append("count" if "fairlane.purchases" in args[2] else "item")
            if loads in (["item", "count"], ["item", "count", "item"]):
                shop.plain_redis.flushall()

    event.listen(engine.sync_engine, "before_cursor_execute", lose)
    assert await knock(admission(shop, engine), "k") is Verdict.OPEN
    assert loads == ["item", "count", "item", "count"]


async def test_an_older_door_record_never_overwrites_a_newer_one(shop: Shop) -> None:
    await write_doors(shop, door(rev=10, within_reach=7))
    await write_doors(shop, door(rev=9, within_reach=100))

    assert shop.plain_redis.hgetall(keys.item("sku-1"))["within_reach"] == "7"
    await write_doors(shop, door(rev=11, within_reach=0))
    written = {"rev": "11", "within_reach": "0", "available": "0", "opens": "", "closes": ""}
    assert shop.plain_redis.hgetall(keys.item("sku-1")) == written


async def test_the_same_door_record_again_lives_anew(shop: Shop) -> None:
    await write_doors(shop, door(rev=10, within_reach=7))
    shop.plain_redis.pexpire(keys.item("sku-1"), 1_000)
    await write_doors(shop, door(rev=10, within_reach=7))

    assert shop.plain_redis.pttl(keys.item("sku-1")) > 1_000


async def test_without_redis_nobody_is_let_in(shop: Shop) -> None:
    await shop.item()

    with pytest.raises(UnavailableError):
        await knock(Admission(shop.engine, shop.redis_that_is_down(), shop.settings), "k")


async def test_without_postgres_an_unknown_item_cannot_be_told(shop: Shop) -> None:
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))

    with pytest.raises(UnavailableError):
        await knock(admission(shop, nowhere), "k")


async def test_without_postgres_the_door_still_works_by_its_records(shop: Shop) -> None:
    await write_doors(shop, door(rev=1, within_reach=5))
    shop.plain_redis.set(keys.waiting("sku-1"), 0)
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))

    assert await knock(admission(shop, nowhere), "k", "sku-1", 5) is Verdict.OPEN
