"""One Celery task per charge: 64 threads of one worker, each with connections that are kept.

`python -m ops.bench.peers.celery_charge` is the worker. It takes the addresses from `SHOP_DATABASE`, `SHOP_BROKER` and
`SHOP_PAYMENT`, and ends when its standard input does: its starter is gone.
"""

from __future__ import annotations

import os
import threading

import psycopg
from celery import Celery

from ops.bench.peers.shop import Payments

QUEUE = "shop.charges"
THREADS = 64
_CHARGE = "shop.charge"


def make_app(broker: str) -> Celery:
    """The app of both sides. As quick as Celery gets: early acknowledgement, no results, no events."""
    app = Celery("shop", broker=broker)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=4,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_pool_limit=None,
    )
    return app


def publish(broker: str, orders: list[str]) -> None:
    """Send a task for each of these orders, over one connection that is kept."""
    with make_app(broker) as app, app.producer_or_acquire() as producer:
        for order in orders:
            app.send_task(_CHARGE, args=(order,), producer=producer)


class _Charger(threading.local):
    """What one thread of the worker has: made on first use, kept for the next task."""

    def __init__(self) -> None:
        self.connection = psycopg.connect(os.environ["SHOP_DATABASE"], autocommit=True)
        self.payments = Payments(os.environ["SHOP_PAYMENT"])

    def charge(self, order: str) -> None:
        claim = "UPDATE shop.orders SET status = 'charging' WHERE id = %s AND status = 'held'"
        if self.connection.execute(claim, [order]).rowcount != 1:
            return
        charge = self.payments.pay(order)
        record = "UPDATE shop.orders SET status = 'paid', charge_id = %s WHERE id = %s"
        self.connection.execute(record, [charge, order])


def main() -> None:
    """Work until the starter is gone."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    app = make_app(os.environ["SHOP_BROKER"])
    charger: list[_Charger] = []
    making = threading.Lock()

    @app.task(name=_CHARGE)
    def charge(order: str) -> None:
        with making:
            if not charger:
                charger.append(_Charger())
        charger[0].charge(order)

    alone = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", "--pool", "threads", "--concurrency", str(THREADS), *alone, "--loglevel", "WARNING"])


def _end_with_the_starter() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
