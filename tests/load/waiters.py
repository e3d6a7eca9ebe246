"""`python -m tests.load.waiters [2000]`: so many wait for a purchase each on one API process; all are decided at once.

Prints how long after its decision each was told, and what a waiter costs the API process in memory. The decider has a
process of its own, as a worker has. The client does next to nothing but note the time; still, all share one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context
from typing import cast
from urllib.parse import urlsplit

from shared.settings import Settings
from tests.integration.http_calls import SHOP
from tests.integration.shopfloor import open_shop
from tests.load.stage import Stage, open_stage

#: Seconds in which connections are made and memory settles, before the decision.
_SETTLE = 4.0
#: Longer than anything here may take.
_BOUND = 60.0


class Waiter(asyncio.Protocol):
    """One connection with one request. `told` is when the answer came, `answer` its bytes."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.answer = b""
        self.told = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, as uvloop's transports are of no class of asyncio.
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if not self.told.done() and b'"finished_at"' in self.answer:
            self.told.set_result(time.time())


@asynccontextmanager
async def waiters(url: str, purchase_ids: list[str], prefer: str) -> AsyncIterator[list[Waiter]]:
    """A waiter for each of these, connected."""
    place = urlsplit(url)
    assert place.hostname
    assert place.port
    opened: list[Waiter] = []
    transports: list[asyncio.BaseTransport] = []
    try:
        for purchase_id in purchase_ids:
            request = (
                f"GET /v1/purchases/{purchase_id} HTTP/1.1\r\nHost: {place.netloc}\r\nPrefer: {prefer}\r\n"
                f"Authorization: {SHOP['Authorization']}\r\n\r\n"
            ).encode()
            transport, waiter = await asyncio.get_running_loop().create_connection(
                lambda request=request: Waiter(request),  # type: ignore[misc]  # of this turn of the loop
                place.hostname,
                place.port,
            )
            transports.append(transport)
            opened.append(waiter)
        yield opened
    finally:
        for connection in transports:
            connection.close()


def _drain(settings: Settings, lane: int | None) -> float:
    """In a process of its own: decide this lane, or only start. Returns how long it took, in seconds."""

    async def run() -> float:
        async with open_shop(settings) as shop:
            with shop.decider(shop.with_settings(decide_slice=60)) as decider:
                began = time.monotonic()
                if lane is not None:
                    await asyncio.to_thread(decider.drain, lane)
                return time.monotonic() - began

    return asyncio.run(run())


async def measure(stage: Stage, count: int) -> None:
    """One run on an open stage."""
    shop = stage.shop
    loop = asyncio.get_running_loop()
    await shop.item(stock=count)
    bought = await shop.buy(*(shop.order() for _ in range(count)))
    async with waiters(stage.url, [bought[0].id], "wait=0") as first:
        await asyncio.wait_for(first[0].told, _BOUND)
    before = stage.rss
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        await loop.run_in_executor(pool, _drain, shop.settings, None)
        async with waiters(stage.url, [record.id for record in bought], "wait=30") as opened:
            await asyncio.sleep(_SETTLE)
            idle = stage.cpu
            await asyncio.sleep(_SETTLE)
            idle = stage.cpu - idle
            meanwhile = stage.rss
            assert not any(waiter.told.done() for waiter in opened), "somebody was answered before the decision"
            telling = stage.cpu
            took = await loop.run_in_executor(pool, _drain, shop.settings, bought[0].lane)
            told = await asyncio.wait_for(asyncio.gather(*(waiter.told for waiter in opened)), _BOUND)
            telling = stage.cpu - telling
    assert all(b'"status":"reserved"' in waiter.answer for waiter in opened)
    decided = {row["id"].hex: row["decided_at"].timestamp() for row in shop.purchases()}
    late = sorted(at - decided[record.id] for record, at in zip(bought, told, strict=True))
    print(f"{count} waiters; deciding all of them took {took:.3f} s")
    print(f"told after their own decision: median {late[len(late) // 2]:.3f} s, last {late[-1]:.3f} s")
    print(f"the last was told {max(told) - min(decided.values()):.3f} s after the first was decided")
    print(f"memory of the API process: {before / 2**20:.1f} MiB before, {meanwhile / 2**20:.1f} MiB with them")
    print(f"per waiter: {(meanwhile - before) / count / 1024:.1f} KiB")
    print(f"processor time of the API process while all wait: {idle / _SETTLE:.0%} of one core")
    print(f"processor time of the API process for telling all of them: {telling:.2f} s")


async def _main(count: int) -> None:
    async with open_stage() as stage:
        await measure(stage, count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("waiters", nargs="?", type=int, default=2_000)
    asyncio.run(_main(parser.parse_args().waiters))
