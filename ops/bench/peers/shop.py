"""The shop that every peer sells from: an item row, an order row, and a payment. As plain as such shops are."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
import psycopg

#: A payment that takes longer has failed.
_PROVIDER_TIMEOUT = 10.0

TABLES = """
CREATE SCHEMA IF NOT EXISTS shop;
CREATE TABLE IF NOT EXISTS shop.items (
    sku       text NOT NULL,
    segment   smallint NOT NULL DEFAULT 0,
    available integer NOT NULL CHECK (available >= 0),
    PRIMARY KEY (sku, segment)
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS shop.orders (
    id        uuid PRIMARY KEY DEFAULT uuidv7(),
    sku       text NOT NULL,
    customer  text NOT NULL,
    status    text NOT NULL,
    charge_id text,
    at        timestamptz NOT NULL DEFAULT now()
);
"""
"""Fewer columns, indexes and checks than Fairlane's schema: whatever that gives, the peers have it."""

RECORD = "INSERT INTO shop.orders (sku, customer, status, charge_id) VALUES (%s, %s, %s, %s) RETURNING id"


@dataclass(frozen=True, slots=True)
class Urls:
    """Where a peer finds its parts. Without `payment` it sells without a payment."""

    database: str
    redis: str
    payment: str | None = None

    def as_environment(self) -> dict[str, str]:
        """What a worker of a peer is started with."""
        return {"SHOP_DATABASE": self.database, "SHOP_BROKER": self.redis, "SHOP_PAYMENT": self.payment or ""}


class Seller(Protocol):
    """One buyer's way to the item, with connections of its own: used by one thread."""

    def buy(self, sku: str, customer: str) -> bool:
        """Buy one unit. Returns False when there was none, or when it was not to be had in time."""
        ...

    def close(self) -> None:
        """Give the connections back."""
        ...


class Payments:
    """The provider, over one kept connection; without a URL everything is free."""

    def __init__(self, url: str | None) -> None:
        self._connection: http.client.HTTPConnection | None = None
        if url is not None:
            at = urlsplit(url)
            self._connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=_PROVIDER_TIMEOUT)

    def pay(self, reference: str) -> str | None:
        """Pay for one unit; returns the provider's id of the charge, None if it is free. Raises OSError if it fails."""
        if self._connection is None:
            return None
        charge = {
            "reference": reference,
            "amount": 18_900,
            "currency": "EUR",
            "customer": reference,
            "payment_token": "tok_visa",
        }
        self._connection.request("POST", "/charges", msgspec.json.encode(charge), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 201:
            raise OSError(f"the provider answered {answer.status}")
        return str(msgspec.json.decode(body)["id"])

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()


def lay_out(database: str, skus: list[str], stock: int, *, segments: int = 1) -> None:
    """Create the tables, with these items and no others, and this stock of each, spread over so many rows."""
    with psycopg.connect(database) as connection:
        connection.execute(TABLES)
        connection.execute("TRUNCATE shop.items")
        connection.execute(
            """
            INSERT INTO shop.items (sku, segment, available)
            SELECT sku, segment, %(stock)s / %(segments)s + (segment < %(stock)s %% %(segments)s)::int
            FROM unnest(%(skus)s::text[]) AS sku, generate_series(0, %(segments)s - 1) AS segment
            """,
            {"skus": skus, "stock": stock, "segments": segments},
        )
