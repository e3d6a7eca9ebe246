"""Charging alone: purchases that are held and due, a provider that takes 50 ms, one process."""

from __future__ import annotations

import time

from ops.bench import lines, selling
from ops.bench.contest import Contest
from ops.bench.peers import celery_charge
from ops.bench.peers.shop import TABLES
from ops.bench.samples import FAIRLANE, Contender, Result, Sample
from ops.bench.usage import Usage, family

NAME = "charges"
PEER = Contender("one Celery task per charge")

_CHARGES, _CHARGES_QUICK = 6_000, 1_500
_TASKS, _TASKS_QUICK = 500, 200
_SKU = "hot"

_UNPAID = "SELECT count(*) FROM shop.orders WHERE status <> 'paid'"
_HOLD = b"""
INSERT INTO shop.orders (sku, customer, status) SELECT 'hot', 'c-' || n, 'held' FROM generate_series(1, %s) n
RETURNING id
"""


def measure(contest: Contest) -> list[Result]:
    """Charged and recorded per second."""
    charges, tasks = contest.scaled(_CHARGES, _CHARGES_QUICK), contest.scaled(_TASKS, _TASKS_QUICK)
    with (
        contest.site.only(["charges"]) as site,
        selling.celery_worker(site, paid=True, module=celery_charge) as worker,
    ):
        lines.create_items(site, [_SKU], 100_000_000)
        site.connection.execute(TABLES)

        def fairlane(purchases: int = charges) -> Sample:
            lines.hold_purchases(site, _SKU, purchases)
            usage = site.usage()
            began = time.monotonic()
            site.call_charges()
            lines.wait_until_settled(site)
            seconds = time.monotonic() - began
            used = usage.read()
            return Sample(purchases, seconds, cpu=used.cpu, memory=used.memory)

        def by_task(purchases: int = tasks) -> Sample:
            rows = site.connection.execute(_HOLD, [purchases]).fetchall()
            usage, worked = site.usage(), Usage({"worker": lambda: family(worker.pid)})
            began = time.monotonic()
            publishing = contest.pool.submit(_publish, site.settings.redis_url, [str(order) for (order,) in rows])
            site.wait(lambda: site.number(_UNPAID) == 0, f"{purchases:,} tasks of a peer")
            seconds = time.monotonic() - began
            used, by_worker = usage.read(), worked.read()
            cpu = {"publisher": publishing.result(), **by_worker.cpu, **used.cpu}
            return Sample(purchases, seconds, cpu=cpu, memory={**by_worker.memory, **used.memory})

        # Connections and prepared statements belong to no round.
        fairlane(500)
        by_task(2 * celery_charge.THREADS)
        samples = contest.run({PEER: by_task, FAIRLANE: fairlane})
    return [Result(NAME, "Charges by one process, 50 ms payment", "charges recorded", samples)]


def _publish(broker: str, orders: list[str]) -> float:
    """Returns the processor seconds it took."""
    before = time.process_time()
    celery_charge.publish(broker, orders)
    return time.process_time() - before
