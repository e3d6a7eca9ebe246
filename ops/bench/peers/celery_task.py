"""One Celery task per purchase, one queue per item, one worker for it: in order and without a lock.

`python -m ops.bench.peers.celery_task` is the worker of the item's queue. It takes the addresses from `SHOP_DATABASE`,
`SHOP_BROKER` and `SHOP_PAYMENT`, and ends when its standard input does: its starter is gone.
"""

from __future__ import annotations

import os
import threading
from functools import cache

import psycopg
from celery import Celery

from ops.bench.peers.shop import RECORD, Payments, Urls

QUEUE = "shop.hot"
_BUY = "shop.buy"


def make_app(broker: str) -> Celery:
    """The app of both sides. Prefetch and early acknowledgement are as quick as Celery gets; results are not kept."""
    app = Celery("shop", broker=broker)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=64,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    return app


def publish(broker: str, sku: str, purchases: int) -> None:
    """Send the tasks, over one connection that is kept."""
    with make_app(broker) as app, app.producer_or_acquire() as producer:
        for number in range(purchases):
            app.send_task(_BUY, args=(sku, f"customer-{number}"), producer=producer)


class _Worker:
    def __init__(self, urls: Urls) -> None:
        self._connection = psycopg.connect(urls.database, autocommit=True)
        self._payments = Payments(urls.payment)

    def buy(self, sku: str, customer: str) -> None:
        row = self._connection.execute("SELECT available FROM shop.items WHERE sku = %s", [sku]).fetchone()
        if row is None or row[0] < 1:
            return
        charge = self._payments.pay(customer)
        with self._connection.transaction():
            self._connection.execute("UPDATE shop.items SET available = available - 1 WHERE sku = %s", [sku])
            self._connection.execute(RECORD, [sku, customer, "paid", charge])


def main() -> None:
    """Work until the starter is gone."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    app = make_app(os.environ["SHOP_BROKER"])

    @cache
    def worker() -> _Worker:
        urls = Urls(os.environ["SHOP_DATABASE"], os.environ["SHOP_BROKER"], os.environ["SHOP_PAYMENT"] or None)
        return _Worker(urls)

    @app.task(name=_BUY)
    def buy(sku: str, customer: str) -> None:
        worker().buy(sku, customer)

    # One purchase at a time is the point of the queue; without a pool of processes there is no hand-over to pay for.
    app.worker_main(
        [
            "worker",
            "--pool",
            "solo",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel",
            "WARNING",
        ]
    )


def _end_with_the_starter() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
