"""The one lock order, and that nobody is passed over: what a statement has locked when it meets somebody else's lock.

Rows lie here in the wrong order on disk, and the plans read them as they lie, as the plans of a grown table may. Only
the statements themselves can put the locks in order.
"""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from shared.crash_points import armed
from shared.routing import lane_of
from tests.integration.shopfloor import Shop
from workers.gateways import Confirmed
from workers.record import Recorder, Result

#: Longer than any test holds a lock: who waits, waits.
PATIENT = {
    "lock_timeout": 60.0,
    "idle_in_transaction_timeout": 60.0,
    "statement_timeout": 60.0,
    "connection_timeout": 90.0,
}

#: For connections opened from now on. A plan through an index would put the rows in order by chance.
AS_THEY_LIE = "DO $$BEGIN EXECUTE format('ALTER DATABASE %I SET enable_indexscan = off', current_database()); END$$"


def lay_backwards(shop: Shop, table: str, column: str) -> None:
    shop.sql(f"CREATE INDEX backwards ON fairlane.{table} ({column} DESC)")
    shop.sql(f"CLUSTER fairlane.{table} USING backwards")
    shop.sql("DROP INDEX fairlane.backwards")
    shop.sql(AS_THEY_LIE)


def assert_free(shop: Shop, rows: str) -> None:
    """Nobody holds these rows."""
    try:
        shop.sql(f"SELECT FROM fairlane.{rows} FOR NO KEY UPDATE NOWAIT")
    except psycopg.errors.LockNotAvailable:
        pytest.fail(f"locked out of turn: {rows}")


def lane_mates() -> tuple[str, str]:
    """Two items of one lane, in the order of their names."""
    first, second = [f"i-{n:03d}" for n in range(200) if lane_of(f"i-{n:03d}", 16) == 0][:2]
    return first, second


async def test_deciding_locks_items_in_the_order_of_their_names(shop: Shop) -> None:
    first, second = lane_mates()
    for sku in (first, second):
        await shop.item(sku)
    await shop.buy(shop.order(second), shop.order(first))
    lay_backwards(shop, "items", "sku")
    with (
        shop.decider(shop.with_settings(**PATIENT)) as decider,
        shop.holding("SELECT FROM fairlane.items WHERE sku = %s FOR NO KEY UPDATE", first) as somebody,
    ):
        deciding = asyncio.create_task(asyncio.to_thread(decider.drain, 0))
        await shop.someone_waits_for_a_lock()
        assert_free(shop, f"items WHERE sku = '{second}'")
        somebody.rollback()
        await deciding
    assert shop.statuses() == ["reserved", "reserved"]


async def test_stock_stays_locked_until_the_verdicts_are_committed(shop: Shop) -> None:
    await shop.item(stock=0)
    (bought,) = await shop.buy(shop.order())
    looked: list[str] = []

    def look(point: str) -> None:
        if point == "decide.before_commit":
            # Also where nothing was taken: stock that came in now would be there, and its buyer told that it is not.
            with pytest.raises(psycopg.errors.LockNotAvailable):
                shop.sql("SELECT FROM fairlane.items FOR NO KEY UPDATE NOWAIT")
            looked.append(point)

    with armed(look), shop.decider() as decider:
        decider.run_batch(bought.lane, wait=True)
    assert looked
    assert shop.status(bought) == "sold_out"


async def test_deciding_reads_the_line_in_order(shop: Shop) -> None:
    await shop.item(stock=1)
    first, _, _ = await shop.buy(shop.order(), shop.order(), shop.order())
    lay_backwards(shop, "purchases", "seq")
    with shop.decider(shop.with_settings(decide_batch=1)) as decider:
        batch = decider.run_batch(first.lane, wait=True)
    assert [record.id for record in batch.records] == [first.id]


async def test_deciding_passes_nobody_over_whom_somebody_keeps(shop: Shop) -> None:
    await shop.item(stock=1)
    kept, later = await shop.buy(shop.order(), shop.order())
    with (
        shop.holding("SELECT FROM fairlane.purchases WHERE id = %s FOR NO KEY UPDATE", kept.id),
        shop.decider(shop.with_settings(lock_timeout=0.05)) as decider,
    ):
        assert (await asyncio.to_thread(decider.drain, kept.lane)).left
    assert shop.statuses() == ["queued", "queued"]
    with shop.decider() as decider:
        decider.drain(later.lane)
    assert shop.statuses() == ["reserved", "waitlisted"]


async def test_recording_locks_items_in_the_order_of_their_names(shop: Shop) -> None:
    first, second = lane_mates()
    for sku in (first, second):
        await shop.item(sku)
    await shop.hold(shop.order(second), shop.order(first))
    claims = await shop.claim()
    lay_backwards(shop, "items", "sku")
    settings = shop.with_settings(**PATIENT)
    recorder = Recorder(shop.another_engine(settings), shop.redis, shop.caller, settings)
    results = [Result.of(claim, Confirmed(f"ch_{n}")) for n, claim in enumerate(claims)]
    with shop.holding("SELECT FROM fairlane.items WHERE sku = %s FOR NO KEY UPDATE", first) as somebody:
        recording = asyncio.create_task(recorder.record(results))
        await shop.someone_waits_for_a_lock()
        assert_free(shop, f"items WHERE sku = '{second}'")
        somebody.rollback()
        await recording
    assert shop.statuses() == ["confirmed", "confirmed"]
