"""The way this project replaces, on the same servers: one Redis lock per item around read, pay, decrement.

redis-py's `Lock` with the library's defaults (a waiter looks ten times a second), except for the two numbers nobody
leaves open: a lease of 30 s, and 10 s of waiting before a buyer gives up.
"""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
import redis
from redis.exceptions import LockError

_THREADS = 32
_SECONDS = 5.0
_LEASE = 30.0
_WAIT = 10.0
_PROVIDER_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class LockedSale:
    """How far it came: units sold in `seconds`, and buyers who waited for the lock in vain."""

    sold: int
    seconds: float
    gave_up: int
    threads: int = _THREADS

    @property
    def rate(self) -> float:
        """Units sold per second."""
        return self.sold / self.seconds


class _Shop:
    def __init__(self, redis_url: str, payment_url: str, stock: int, stop: threading.Event) -> None:
        self._redis = redis.Redis.from_url(redis_url)
        self._payment = urlsplit(payment_url)
        self._redis.set("locked-way:stock", stock)
        self._ends = time.monotonic() + _SECONDS
        self._stop = stop
        self._count = threading.Lock()
        self.sold = 0
        self.gave_up = 0

    def buy_until_the_end(self, buyer: int) -> None:
        connection = http.client.HTTPConnection(
            self._payment.hostname or "", self._payment.port, timeout=_PROVIDER_TIMEOUT
        )
        lock = self._redis.lock("locked-way:lock", timeout=_LEASE, blocking_timeout=_WAIT)
        number = 0
        try:
            while self._open():
                number += 1
                if not lock.acquire():
                    with self._count:
                        self.gave_up += 1
                    continue
                try:
                    if self._open():
                        self._buy(connection, f"locked-{buyer}-{number}")
                finally:
                    lock.release()
        except (LockError, OSError, http.client.HTTPException):
            with self._count:
                self.gave_up += 1
        finally:
            connection.close()

    def _open(self) -> bool:
        return not self._stop.is_set() and time.monotonic() < self._ends

    def _buy(self, connection: http.client.HTTPConnection, reference: str) -> None:
        left = int(self._redis.get("locked-way:stock") or 0)
        if left <= 0:
            return
        charge = {
            "reference": reference,
            "amount": 18_900,
            "currency": "EUR",
            "customer": reference,
            "payment_token": "tok_visa",
        }
        connection.request("POST", "/charges", msgspec.json.encode(charge), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 201:
            return
        self._redis.set("locked-way:stock", left - 1)
        if self._open():
            with self._count:
                self.sold += 1

    def close(self) -> None:
        self._redis.delete("locked-way:stock")
        self._redis.close()


def sell_with_a_lock(redis_url: str, payment_url: str, stock: int, stop: threading.Event) -> LockedSale:
    """Let 32 buyers at one item for five seconds, or until `stop` is set."""
    shop = _Shop(redis_url, payment_url, stock, stop)
    threads = [
        threading.Thread(target=shop.buy_until_the_end, args=(number,), daemon=True) for number in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS + _WAIT + _PROVIDER_TIMEOUT)
    shop.close()
    return LockedSale(shop.sold, _SECONDS, shop.gave_up)
