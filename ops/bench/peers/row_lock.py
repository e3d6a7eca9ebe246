"""`SELECT … FOR UPDATE` on the item around pay, decrement, record."""

from __future__ import annotations

import psycopg

from ops.bench.peers.shop import RECORD, Payments, Urls


class RowLockSeller:
    """One transaction per purchase, which holds the item's row until it is over."""

    def __init__(self, urls: Urls) -> None:
        self._connection = psycopg.connect(urls.database, autocommit=True)
        self._payments = Payments(urls.payment)

    def buy(self, sku: str, customer: str) -> bool:
        """See `Seller`."""
        with self._connection.transaction():
            lock = "SELECT available FROM shop.items WHERE sku = %s FOR UPDATE"
            row = self._connection.execute(lock, [sku]).fetchone()
            if row is None or row[0] < 1:
                return False
            charge = self._payments.pay(customer)
            self._connection.execute("UPDATE shop.items SET available = available - 1 WHERE sku = %s", [sku])
            self._connection.execute(RECORD, [sku, customer, "paid", charge])
        return True

    def close(self) -> None:
        """See `Seller`."""
        self._payments.close()
        self._connection.close()
