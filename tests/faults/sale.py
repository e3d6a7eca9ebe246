"""A sale that is hurt in its middle, and must sell out exactly all the same.

    async with sale(floor, sku) as buyers:    # buyers come, and the first have paid
        hurt(floor)                           # no longer than until it was felt
        heal(floor)
    # sold out to the last unit; nobody lost, nothing sold or charged twice, nobody refused before the stock was gone

How long a fault lasts depends on the machine. So there is more stock than any fault can see sold, and when the fault
is over the stock is set to what was accepted until then and a few more, as an admin may do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp

from tests.acceptance.shop import Shop
from tests.faults.crowd import Crowd, crowd
from tests.faults.floor import Floor

#: Buyers a second: enough that each stage has somebody in it at any time, and no burden on two cores.
RATE = 30
#: Of which the sale knows that it runs.
PAID = 10
#: Units for sale while the fault lasts, and after it.
PLENTY, A_FEW = 5_000, 20
#: Seconds in which something happens that must happen.
BOUND = 20.0
#: Seconds in which the rest is sold after the fault: an unknown call takes about ten.
SOLD_WITHIN = 40.0
#: Buyers in trouble after whom the fault has surely been felt.
FELT = 20


async def until(condition: Callable[[], bool], what: str, within: float = BOUND) -> None:
    """Wait until `condition()` holds; fails with `what` after `within` seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.05)


async def felt(buyers: Crowd, trouble: str | None = None) -> None:
    """Return when more buyers have met this trouble (a key of `Crowd.troubles`), any if None."""

    def met() -> int:
        return buyers.troubles.total() if trouble is None else buyers.troubles[trouble]

    before = met()
    await until(lambda: met() >= before + FELT, f"buyers who feel it: {buyers.troubles}")


@asynccontextmanager
async def sale(floor: Floor, sku: str, *, tokens: Sequence[str] = ("tok_visa",)) -> AsyncIterator[Crowd]:
    """A sale under way. On leaving, it must sell out and end well, and no process may have died of the fault."""
    floor.put_item(sku, PLENTY)
    async with crowd(floor.url, [sku], rate=RATE, tokens=tokens) as buyers:
        await until(lambda: floor.statuses(sku)["confirmed"] >= PAID, "a sale that runs")
        yield buyers
        assert not buyers.refused, f"refused although there was stock: {buyers.refused}"
        stock = await _set_the_stock(floor, sku)
        await until(lambda: buyers.refused.total() > 0, "a sale that sells out", SOLD_WITHIN)
    for name in floor.lines:
        process = floor.processes[name]
        assert process.alive, f"{name} ended; its log ends:\n{process.logs_of_run()[-4000:]}"
    ending = await floor.ends_well(buyers)
    assert ending.confirmed == stock, f"{ending.statuses} of {stock}"
    assert set(buyers.refused) == {"sold-out"}


async def _set_the_stock(floor: Floor, sku: str) -> int:
    timeout = aiohttp.ClientTimeout(total=BOUND)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        shop = Shop(session, floor.url)
        deadline = time.monotonic() + BOUND
        while True:
            stock = floor.statuses(sku).total() + A_FEW
            reply = await shop.put_item(sku, stock)
            if reply.status == 200:
                return stock
            # Not yet well again, or so many were accepted just now that this would be too little.
            assert reply.status in (409, 503), (reply.status, reply.body)
            assert time.monotonic() < deadline, f"the stock could not be set: {reply.body}"
            await asyncio.sleep(0.1)
