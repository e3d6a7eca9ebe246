"""The crowd at work: each buyer uses the client of the API, sends as often as planned, and asks until it is over."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import aiohttp

from ops.demo.crowd import Buyer, Manner
from producers.client import Client, Purchase, RefusedError

#: Connection pools, each of so many connections: a few hundred requests on the way, as behind a shop's proxies.
_POOLS, _CONNECTIONS = 4, 64
#: A buyer who hangs up does so after this long: about when the request has reached the server.
_HANG_UP_AFTER = 0.01


@dataclass(slots=True)
class Visit:
    """What one buyer saw. `final_seconds` is from the acceptance to the end; None for what did not happen."""

    buyer: Buyer
    ids: set[str] = field(default_factory=set)
    status: str | None = None
    final: bool = False
    final_seconds: float | None = None


@dataclass(slots=True)
class Tally:
    """What the crowd did so far, for the live view and the report.

    `accept_seconds`: of each request that was answered 202, how long that took.
    """

    arrived: int = 0
    requests: int = 0
    accepted: int = 0
    replayed: int = 0
    refused: int = 0
    finished: int = 0
    trouble: Counter[str] = field(default_factory=Counter)
    accept_seconds: list[float] = field(default_factory=list)

    def trace(self) -> aiohttp.TraceConfig:
        """What makes a session count its requests here."""
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self._begun)
        trace.on_request_end.append(self._answered)
        return trace

    async def _begun(self, session: Any, context: SimpleNamespace, _: aiohttp.TraceRequestStartParams) -> None:
        self.requests += 1
        context.began = time.monotonic()

    async def _answered(self, session: Any, context: SimpleNamespace, end: aiohttp.TraceRequestEndParams) -> None:
        if end.response.status == 202:
            self.accept_seconds.append(time.monotonic() - context.began)

    def troubled(self, trouble: str) -> None:
        """A request is repeated."""
        self.trouble[trouble] += 1


class Crowd:
    """All buyers on one event loop. `tally` and `visits` may be read at any time."""

    def __init__(self, api: str, secret: str, buyers: Sequence[Buyer]) -> None:
        self.tally = Tally()
        self.visits = [Visit(buyer) for buyer in buyers]
        self.seconds = 0.0
        self._api = api
        self._secret = secret

    async def run(self, within: float) -> None:
        """Let everybody buy; ends when all have their answer, at the latest after `within` seconds."""
        began = time.monotonic()
        async with AsyncExitStack() as sessions:
            clients = [await sessions.enter_async_context(self._client(within)) for _ in range(_POOLS)]
            visits = [
                asyncio.create_task(self._visit(visit, clients[number % _POOLS], began, within))
                for number, visit in enumerate(self.visits)
            ]
            try:
                _, late = await asyncio.wait(visits, timeout=within)
                for task in late:
                    task.cancel()
                for result in await asyncio.gather(*visits, return_exceptions=True):
                    if isinstance(result, Exception):
                        raise result
            finally:
                self.seconds = time.monotonic() - began
                # Also after Ctrl-C: nobody may be left who would go on buying on a closed session.
                for task in visits:
                    task.cancel()
                await asyncio.gather(*visits, return_exceptions=True)

    @asynccontextmanager
    async def _client(self, patience: float) -> AsyncIterator[Client]:
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
        async with (
            aiohttp.ClientSession(connector=connector, trace_configs=[self.tally.trace()]) as session,
            Client(
                self._api, self._secret, patience=patience, session=session, on_trouble=self.tally.troubled
            ) as client,
        ):
            yield client

    async def _visit(self, visit: Visit, client: Client, began: float, within: float) -> None:
        buyer = visit.buyer
        await asyncio.sleep(max(0.0, began + buyer.arrives - time.monotonic()))
        self.tally.arrived += 1
        if buyer.manner is Manner.LOST:
            for _ in range(buyer.requests - 1):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_HANG_UP_AFTER):
                        await self._buy(visit, client)
        copies = buyer.requests if buyer.manner is Manner.TWINS else 1
        purchases = await asyncio.gather(*(self._buy(visit, client) for _ in range(copies)))
        accepted = time.monotonic()
        if buyer.manner is Manner.AGAIN:
            for _ in range(buyer.requests - 1):
                purchases.append(await self._buy(visit, client))
        purchase = next((purchase for purchase in purchases if purchase is not None), None)
        if purchase is None:
            visit.status = "refused at the door"
            self.tally.refused += 1
        else:
            self.tally.accepted += 1
            # Each poll comes when the service says. Held requests would need a connection per buyer.
            purchase = await client.result(purchase.id, within=within, wait=0)
            visit.status, visit.final = purchase.status, purchase.final
            visit.final_seconds = time.monotonic() - accepted
        self.tally.finished += 1

    async def _buy(self, visit: Visit, client: Client) -> Purchase | None:
        """The purchase that the buyer's key stands for, or None when the door says no for good."""
        buyer = visit.buyer
        try:
            bought = await client.buy(
                buyer.sku, customer=buyer.customer, payment_token=buyer.token, quantity=buyer.quantity, key=buyer.key
            )
        except RefusedError as error:
            if error.status == HTTPStatus.CONFLICT:
                return None
            raise
        visit.ids.add(bought.id)
        self.tally.replayed += bought.replayed
        return bought.purchase
