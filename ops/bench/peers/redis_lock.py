"""A Redis lock per item around read, pay, decrement, record: redis-py's `Lock`, wait 10 s, lease 30 s."""

from __future__ import annotations

import psycopg
from redis import Redis

from ops.bench.peers.shop import RECORD, Payments, Urls

_LEASE = 30.0
_WAIT = 10.0


class LockSeller:
    """`sleep` is the pause between two tries to get the lock: 0.1 s is the library's default."""

    def __init__(self, urls: Urls, sleep: float = 0.1) -> None:
        self._redis: Redis = Redis.from_url(urls.redis)
        self._connection = psycopg.connect(urls.database, autocommit=True)
        self._payments = Payments(urls.payment)
        self._sleep = sleep

    def buy(self, sku: str, customer: str) -> bool:
        """See `Seller`."""
        lock = self._redis.lock(f"shop:{sku}", timeout=_LEASE, blocking_timeout=_WAIT, sleep=self._sleep)
        if not lock.acquire():
            return False
        try:
            row = self._connection.execute("SELECT available FROM shop.items WHERE sku = %s", [sku]).fetchone()
            if row is None or row[0] < 1:
                return False
            charge = self._payments.pay(customer)
            with self._connection.transaction():
                self._connection.execute("UPDATE shop.items SET available = %s WHERE sku = %s", [row[0] - 1, sku])
                self._connection.execute(RECORD, [sku, customer, "paid", charge])
            return True
        finally:
            lock.release()

    def close(self) -> None:
        """See `Seller`."""
        self._payments.close()
        self._connection.close()
        self._redis.close()


class PromptLockSeller(LockSeller):
    """The same, asking for the lock every 10 ms: with a payment inside, that was the best of the pauses tried."""

    def __init__(self, urls: Urls) -> None:
        super().__init__(urls, sleep=0.01)
