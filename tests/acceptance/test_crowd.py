"""A crowd for little stock: the queue stays as short as the stock, and everybody is told something clear."""

from __future__ import annotations

import asyncio
from collections import Counter

import psycopg

from tests.acceptance.service import Service
from tests.acceptance.shop import Shop

BUYERS = 5_000
STOCK = 100
#: Requests under way at once: a client of the test needs its share of two cores, too.
AT_ONCE = 250
#: Looks at the queue are this far apart: closer than the batches in which it grows, and Postgres has other work.
LOOK_EVERY = 0.005

WAITING = (
    b"SELECT coalesce(sum(quantity), 0) FROM fairlane.purchases WHERE item = %s AND status IN ('queued', 'waitlisted')"
)


async def test_a_crowd_for_a_hundred_units(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=STOCK)
    lengths: list[int] = []
    sold = asyncio.Event()

    async def watch() -> None:
        """How many units wait, again and again."""
        async with await psycopg.AsyncConnection.connect(service.database_url, autocommit=True) as connection:
            while not sold.is_set():
                row = await (await connection.execute(WAITING, [sku])).fetchone()
                assert row is not None
                lengths.append(int(row[0]))
                await asyncio.sleep(LOOK_EVERY)

    at_once = asyncio.Semaphore(AT_ONCE)

    async def buyer() -> str:
        """How the buyer was answered: a final state, or the refusal."""
        async with at_once:
            reply = await shop.buy(sku)
        if reply.status == 503:
            assert int(reply.headers["Retry-After"]) >= 1
        if reply.status in (409, 503):
            return reply.slug or ""
        assert reply.status == 202, reply.body
        return str((await shop.final(reply.body["id"]))["status"])

    watching = asyncio.create_task(watch())
    try:
        ends = Counter(await asyncio.gather(*(buyer() for _ in range(BUYERS))))
    finally:
        sold.set()
        await watching

    assert ends["confirmed"] == STOCK
    assert set(ends) <= {"confirmed", "sold_out", "sold-out", "queue-full"}, ends
    assert ends["sold-out"] + ends["queue-full"] > BUYERS // 2, "most are refused at the door"
    assert 0 < max(lengths) <= STOCK, f"{len(lengths)} looks"
    item = await shop.item(sku)
    assert (item["available"], item["held"], item["sold"]) == (0, 0, STOCK)
