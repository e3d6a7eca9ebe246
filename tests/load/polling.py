"""`python -m tests.load.polling [20000] [--seconds 20]`: so many queued purchases are polled as fast as one client can.

Prints polls and Postgres transactions (each is one statement) per poll. Nobody decides meanwhile. The lanes' watermarks
are written as the sweep does, but without its questions to Postgres, so that what is counted is the API's.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from itertools import cycle

import aiohttp

from shared import statuses
from tests.integration.http_calls import SHOP
from tests.integration.shopfloor import Shop
from tests.load.stage import Stage, open_stage

#: Requests under way at once.
_AT_ONCE = 64
#: Seconds after which Postgres has counted what its sessions did: they report once a second.
_COUNTED_AFTER = 3.0
_ITEMS = 50


async def measure(stage: Stage, purchases: int, seconds: float) -> None:
    """One run on an open stage."""
    shop = stage.shop
    for number in range(_ITEMS):
        await shop.item(f"sku-{number}", stock=purchases)
    bought = [
        record
        for first in range(0, purchases, 5_000)
        for record in await shop.buy(
            *(shop.order(f"sku-{number % _ITEMS}") for number in range(first, min(purchases, first + 5_000)))
        )
    ]
    ids = cycle([record.id for record in bought])
    # Older than anything that is believed for its youth alone.
    await asyncio.sleep(shop.settings.status_fresh + 0.5)
    sweeping = asyncio.create_task(_write_watermarks(shop))
    await asyncio.sleep(_COUNTED_AFTER)
    before = _transactions(shop)
    answers: Counter[str] = Counter()
    end = time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=_AT_ONCE)
    async with aiohttp.ClientSession(connector=connector, headers=SHOP) as session:

        async def poll() -> None:
            while time.monotonic() < end:
                async with session.get(f"{stage.url}/v1/purchases/{next(ids)}") as reply:
                    answers[(await reply.json())["status"]] += 1

        await asyncio.gather(*(poll() for _ in range(_AT_ONCE)))
    await asyncio.sleep(_COUNTED_AFTER)
    transactions = _transactions(shop) - before
    sweeping.cancel()
    polls = answers.total()
    print(f"{purchases} purchases, {polls} polls in {seconds:g} s ({polls / seconds:.0f} a second): {dict(answers)}")
    print(f"{transactions} transactions in Postgres, {transactions / polls:.5f} per poll")


async def _write_watermarks(shop: Shop) -> None:
    lowest = min(row["seq"] for row in shop.purchases()) - 1
    while True:
        async with shop.redis.pipeline(transaction=False) as pipe:
            for lane in range(shop.settings.lanes):
                statuses.queue_watermark(pipe, lane, lowest)
            await pipe.execute()
        await asyncio.sleep(shop.settings.sweep_every)


def _transactions(shop: Shop) -> int:
    (row,) = shop.sql(
        "SELECT xact_commit + xact_rollback AS n FROM pg_stat_database WHERE datname = current_database()"
    )
    return int(row["n"])


async def _main(purchases: int, seconds: float) -> None:
    async with open_stage() as stage:
        await measure(stage, purchases, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("purchases", nargs="?", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    asyncio.run(_main(given.purchases, given.seconds))
