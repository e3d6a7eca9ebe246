"""`fairlane buy`: one purchase over the HTTP API, from the request to the result."""

from __future__ import annotations

import asyncio
import sys
import uuid
from dataclasses import dataclass, field

import msgspec

from producers.client import Client, RefusedError
from shared.errors import FairlaneError


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be bought. Without a `key` a new one is made, and told when it is needed again."""

    item: str
    quantity: int
    customer: str
    payment_token: str = field(repr=False)
    key: str | None = None


async def buy_one(url: str, api_key: str, wish: Wish, within: float) -> int:
    """Buy, wait for at most `within` seconds, and print the purchase as a line of JSON. Returns the exit code."""
    key = wish.key or uuid.uuid4().hex
    again = f"to ask again for the same purchase: --key {key}"
    try:
        async with Client(url, api_key, patience=within) as client:
            try:
                bought = await client.buy(
                    wish.item, customer=wish.customer, payment_token=wish.payment_token, quantity=wish.quantity, key=key
                )
            except RefusedError as error:
                return _told(f"{error}", 1)
            purchase = await client.result(bought.id, within=within)
    except ValueError as error:
        return _told(f"{error}", 2)
    except FairlaneError as error:
        # Also a refusal to tell: there is a purchase, and it goes on.
        return _told(f"{error}; {again}", 2)
    except asyncio.CancelledError:
        _told(f"stopped; {again}", 2)
        raise
    print(msgspec.json.encode(purchase).decode())
    if not purchase.final:
        return _told(f"{purchase.status} after {within:g} s; {again}", 2)
    return 0 if purchase.confirmed else 1


def _told(message: str, code: int) -> int:
    print(f"fairlane: {message}", file=sys.stderr)
    return code
