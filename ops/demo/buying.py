"""The crowd at work: each buyer sends the request, as often as planned, and asks until the answer is final."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import msgspec

from ops.demo.crowd import Buyer, Manner
from shared.states import FINAL

#: Connection pools, each of so many connections: a few hundred requests on the way, as behind a shop's proxies.
_POOLS, _CONNECTIONS = 4, 64
#: One request, waiting for a connection included. The API answers within milliseconds, or a second or two when buyers
#: and API share two cores; a timeout would only add to the load.
_REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30)
#: Buyers ask again after `Retry-After`, but at the latest after this long: impatient, and a harder test of the API.
_ASK_EVERY = 0.5
#: A buyer who hangs up does so after this long: about when the request has reached the server.
_HANG_UP_AFTER = 0.01

_FINAL = frozenset(str(status) for status in FINAL)


class Purchase(msgspec.Struct):
    """What a buyer looks at of a purchase."""

    id: str
    status: str


@dataclass(slots=True)
class Visit:
    """What one buyer saw. Times in seconds; None for what did not happen."""

    buyer: Buyer
    ids: set[str] = field(default_factory=set)
    status: str | None = None
    accept_seconds: float | None = None
    final_seconds: float | None = None

    @property
    def final(self) -> bool:
        """Whether the purchase was seen to end."""
        return self.status in _FINAL


@dataclass(slots=True)
class Tally:
    """What the crowd did so far, for the live view and the report."""

    arrived: int = 0
    requests: int = 0
    accepted: int = 0
    replayed: int = 0
    refused: int = 0
    finished: int = 0
    trouble: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Reply:
    """An answer to a POST: a purchase, a refusal for good, or neither (ask again)."""

    purchase: Purchase | None = None
    refused: str | None = None
    retry_after: float = _ASK_EVERY


class Crowd:
    """All buyers on one event loop. `tally` and `visits` may be read at any time."""

    def __init__(self, api: str, secret: str, buyers: Sequence[Buyer], seed: int) -> None:
        self.tally = Tally()
        self.visits = [Visit(buyer) for buyer in buyers]
        self.seconds = 0.0
        self._api = api
        self._headers = {"Authorization": f"Bearer {secret}"}
        self._dice = random.Random(seed)

    async def run(self, within: float) -> None:
        """Let everybody buy; ends when all have their answer, at the latest after `within` seconds."""
        began = time.monotonic()
        sessions = [
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_CONNECTIONS), timeout=_REQUEST_TIMEOUT, headers=self._headers
            )
            for _ in range(_POOLS)
        ]
        visits = [
            asyncio.create_task(self._visit(visit, sessions[number % _POOLS], began))
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
            for session in sessions:
                await session.close()

    async def _visit(self, visit: Visit, session: aiohttp.ClientSession, began: float) -> None:
        buyer = visit.buyer
        await asyncio.sleep(max(0.0, began + buyer.arrives - time.monotonic()))
        self.tally.arrived += 1
        if buyer.manner is Manner.LOST:
            for _ in range(buyer.requests - 1):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_HANG_UP_AFTER):
                        await self._post(visit, session)
        copies = buyer.requests if buyer.manner is Manner.TWINS else 1
        replies = await asyncio.gather(*(self._buy(visit, session) for _ in range(copies)))
        accepted = time.monotonic()
        if buyer.manner is Manner.AGAIN:
            for _ in range(buyer.requests - 1):
                replies.append(await self._buy(visit, session))
        purchase = next((reply.purchase for reply in replies if reply.purchase is not None), None)
        if purchase is None:
            visit.status = next(reply.refused for reply in replies)
            self.tally.refused += 1
        else:
            self.tally.accepted += 1
            visit.status = (await self._follow(purchase, session)).status
            visit.final_seconds = time.monotonic() - accepted
        self.tally.finished += 1

    async def _buy(self, visit: Visit, session: aiohttp.ClientSession) -> _Reply:
        """Send the request until it is accepted or refused; the key makes that safe."""
        while True:
            reply = await self._post(visit, session)
            if reply.purchase is not None or reply.refused is not None:
                return reply
            await self._pause(reply.retry_after)

    async def _post(self, visit: Visit, session: aiohttp.ClientSession) -> _Reply:
        buyer = visit.buyer
        body = {
            "item": buyer.sku,
            "quantity": buyer.quantity,
            "customer": buyer.customer,
            "payment_token": buyer.token,
        }
        self.tally.requests += 1
        sent = time.monotonic()
        try:
            async with session.post(
                f"{self._api}/v1/purchases", json=body, headers={"Idempotency-Key": buyer.key}
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.tally.trouble[type(error).__name__] += 1
            return _Reply()
        if response.status in (200, 202):
            purchase = msgspec.json.decode(content, type=Purchase)
            visit.ids.add(purchase.id)
            if visit.accept_seconds is None:
                visit.accept_seconds = time.monotonic() - sent
            if response.headers.get("Idempotent-Replayed") == "true":
                self.tally.replayed += 1
            return _Reply(purchase)
        if response.status == 409:
            return _Reply(refused="refused at the door")
        if response.status in (429, 503):
            self.tally.trouble[str(response.status)] += 1
            return _Reply(retry_after=_retry_after(response))
        raise RuntimeError(f"POST /v1/purchases answered {response.status}: {content.decode(errors='replace')[:300]}")

    async def _follow(self, purchase: Purchase, session: aiohttp.ClientSession) -> Purchase:
        """Ask for the purchase until it is final."""
        retry_after = _ASK_EVERY
        while purchase.status not in _FINAL:
            await self._pause(retry_after)
            self.tally.requests += 1
            try:
                async with session.get(f"{self._api}/v1/purchases/{purchase.id}") as response:
                    content = await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.tally.trouble[type(error).__name__] += 1
                continue
            retry_after = _retry_after(response)
            if response.status == 200:
                purchase = msgspec.json.decode(content, type=Purchase)
            elif response.status in (429, 503):
                self.tally.trouble[str(response.status)] += 1
            else:
                raise RuntimeError(f"GET of a purchase answered {response.status}")
        return purchase

    async def _pause(self, retry_after: float) -> None:
        await asyncio.sleep(min(retry_after, _ASK_EVERY) * self._dice.uniform(0.75, 1.25))


def _retry_after(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else _ASK_EVERY
