"""Buying over HTTP, as a client of the API does it: one key per purchase, retries on 503, polls until final."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy

FINAL = frozenset({"confirmed", "declined", "sold_out", "limit_reached", "cancelled", "expired"})

#: Seconds in which a purchase is final on a busy two-core machine: a call may be lost, and the sweep repeats it.
FINAL_WITHIN = 30.0
#: Polls are this far apart. Nothing is tested by it.
POLL_EVERY = 0.05


@dataclass(frozen=True)
class Reply:
    """What the API answered; `body` is the JSON."""

    status: int
    headers: CIMultiDictProxy[str]
    body: Any

    @property
    def replayed(self) -> bool:
        """Whether it says that an earlier request made the purchase."""
        return self.headers.get("Idempotent-Replayed") == "true"

    @property
    def slug(self) -> str | None:
        """The kind of problem, if it is one."""
        if self.headers["Content-Type"] != "application/problem+json":
            return None
        return str(self.body["type"]).removeprefix("/problems/")


class Shop:
    """One client of the API and its connections."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def put_item(self, sku: str, stock: int, **terms: object) -> Reply:
        """Create or change an item, as the admin."""
        body = {"name": sku, "stock": stock, "price": 1200, "currency": "EUR"} | terms
        return await self.send("PUT", f"/v1/items/{sku}", secret="admin-secret", json=body)

    async def item(self, sku: str) -> dict[str, Any]:
        """The item as it stands."""
        body: dict[str, Any] = (await self.send("GET", f"/v1/items/{sku}")).body
        return body

    async def buy(
        self,
        sku: str,
        *,
        key: str | None = None,
        token: str = "tok_visa",
        customer: str | None = None,
        quantity: int = 1,
    ) -> Reply:
        """One request to buy; a new key and a new customer unless they are given."""
        body = {
            "item": sku,
            "quantity": quantity,
            "customer": customer or f"c-{uuid.uuid4()}",
            "payment_token": token,
        }
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        return await self.send("POST", "/v1/purchases", headers=headers, json=body)

    async def buy_insisting(self, sku: str, **order: Any) -> Reply:
        """Buy with one key, and again with the same key and body as long as the answer is 503."""
        order = {"key": str(uuid.uuid4()), "customer": f"c-{uuid.uuid4()}"} | order
        deadline = time.monotonic() + FINAL_WITHIN
        while True:
            reply = await self.buy(sku, **order)
            if reply.status != 503 or time.monotonic() > deadline:
                return reply
            await asyncio.sleep(POLL_EVERY)

    async def show(self, purchase_id: str) -> dict[str, Any]:
        """The purchase as it stands."""
        reply = await self.send("GET", f"/v1/purchases/{purchase_id}")
        assert reply.status == 200, (reply.status, reply.body)
        body: dict[str, Any] = reply.body
        return body

    async def until(self, purchase_id: str, *statuses: str, bound: float = FINAL_WITHIN) -> dict[str, Any]:
        """Poll until the purchase has one of these statuses; fails after `bound` seconds."""
        deadline = time.monotonic() + bound
        while (purchase := await self.show(purchase_id))["status"] not in statuses:
            assert time.monotonic() < deadline, f"not {' or '.join(statuses)} within {bound:g} s: {purchase}"
            await asyncio.sleep(POLL_EVERY)
        return purchase

    async def final(self, purchase_id: str, bound: float = FINAL_WITHIN) -> dict[str, Any]:
        """Poll until the purchase is final."""
        return await self.until(purchase_id, *FINAL, bound=bound)

    async def send(
        self,
        method: str,
        path: str,
        *,
        secret: str = "shop-secret",
        headers: Mapping[str, str] | None = None,
        json: object = None,
    ) -> Reply:
        """One request with an API key."""
        async with self._session.request(
            method,
            self.url + path,
            headers={"Authorization": f"Bearer {secret}"} | dict(headers or {}),
            json=json,
            allow_redirects=False,
        ) as reply:
            return Reply(reply.status, reply.headers, await reply.json(content_type=None))
