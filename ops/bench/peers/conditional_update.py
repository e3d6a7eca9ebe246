"""A conditional UPDATE: take a unit if there is one, record the order, pay afterwards.

Quick, and each of its users must then write what makes it safe: a worker that dies between the two transactions leaves
a unit taken and a payment of which nobody knows.
"""

from __future__ import annotations

import random

import psycopg

from ops.bench.peers.shop import RECORD, Payments, Urls

SEGMENTS = 10


class UpdateSeller:
    """The stock of an item in one row."""

    def __init__(self, urls: Urls) -> None:
        self._connection = psycopg.connect(urls.database, autocommit=True)
        self._payments = Payments(urls.payment)
        self._paid = urls.payment is None

    def buy(self, sku: str, customer: str) -> bool:
        """See `Seller`."""
        with self._connection.transaction():
            if not self._take(sku):
                return False
            row = self._connection.execute(RECORD, [sku, customer, "paid" if self._paid else "held", None]).fetchone()
        if not self._paid and row is not None:
            charge = self._payments.pay(customer)
            pay = "UPDATE shop.orders SET status = 'paid', charge_id = %s WHERE id = %s"
            self._connection.execute(pay, [charge, row[0]])
        return True

    def _take(self, sku: str) -> bool:
        take = "UPDATE shop.items SET available = available - 1 WHERE sku = %s AND available >= 1"
        return self._connection.execute(take, [sku]).rowcount == 1

    def close(self) -> None:
        """See `Seller`."""
        self._payments.close()
        self._connection.close()


class SegmentSeller(UpdateSeller):
    """The stock of an item spread over ten rows, so that ten can take at once; an empty one sends on to the next."""

    def _take(self, sku: str) -> bool:
        first = random.randrange(SEGMENTS)
        take = "UPDATE shop.items SET available = available - 1 WHERE sku = %s AND segment = %s AND available >= 1"
        return any(
            self._connection.execute(take, [sku, (first + tried) % SEGMENTS]).rowcount == 1 for tried in range(SEGMENTS)
        )
