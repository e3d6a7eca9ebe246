"""One round of a peer: its shop laid out, its buyers let loose, what was used by whom."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType

from ops.bench.buyers import PEERS, Demand, Peer, rush
from ops.bench.contest import Contest, Run
from ops.bench.peers import celery_task
from ops.bench.peers.shop import Urls, lay_out
from ops.bench.samples import Contender, Sample, curve_of
from ops.bench.site import Site
from ops.bench.usage import Usage, family

CELERY_TASK = Contender("one Celery task per purchase")
#: More than anybody buys.
_PLENTY = 10_000_000


def urls_of(site: Site, *, paid: bool) -> Urls:
    """Where a peer finds the site's servers; `paid` says whether it charges."""
    return Urls(site.libpq_url, site.settings.redis_url, site.provider.url if paid and site.provider else None)


def peers(
    contest: Contest, site: Site, demand: Demand, *, paid: bool, chosen: Sequence[Peer] | None = None
) -> dict[Contender, Run]:
    """These peers as contenders, all of them unless some are chosen: each sells what is asked for."""
    chosen = contest.chosen(PEERS) if chosen is None else chosen
    return {Contender(peer.name): partial(sell, contest, site, peer, demand, paid=paid) for peer in chosen}


@contextmanager
def by_task(contest: Contest, site: Site, purchases: int, *, paid: bool) -> Iterator[dict[Contender, Run]]:
    """The peer with a task per purchase as a contender, and its worker while this lasts; nobody in a quick run."""
    if contest.quick:
        yield {}
        return
    with celery_worker(site, paid=paid) as worker:
        yield {CELERY_TASK: partial(_sell_by_task, contest, site, worker.pid, purchases, paid=paid)}


def sell(contest: Contest, site: Site, peer: Peer, demand: Demand, *, paid: bool, stock: int = _PLENTY) -> Sample:
    """One round of one peer. Counted is what was sold, or answered if less than that was there."""
    urls = urls_of(site, paid=paid)
    lay_out(urls.database, sorted(set(demand.skus)), stock, segments=peer.segments)
    usage = site.usage()
    bought = rush(contest.pool, peer, urls, demand)
    used = usage.read()
    count = bought.sold if stock == _PLENTY else bought.sold + bought.refused
    return Sample(
        count,
        bought.ended - bought.began,
        curve_of(bought.latencies),
        {"buyers": bought.cpu, **used.cpu},
        {"buyers": bought.memory, **used.memory},
    )


@contextmanager
def celery_worker(site: Site, *, paid: bool, module: ModuleType = celery_task) -> Iterator[subprocess.Popen[bytes]]:
    """The worker of a peer, which ends with the block or with this process."""
    command = [sys.executable, "-m", module.__name__]
    environment = {**site.process_environment, **urls_of(site, paid=paid).as_environment()}
    with (site.directory / "peer.log").open("ab") as log:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield worker
    finally:
        if worker.stdin is not None:
            worker.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            worker.wait(5)
        worker.kill()
        worker.wait()


def _sell_by_task(contest: Contest, site: Site, worker: int, purchases: int, *, paid: bool) -> Sample:
    """One round of the peer with a task per purchase: published by one process while the worker is at it."""
    urls = urls_of(site, paid=paid)
    lay_out(urls.database, ["hot"], _PLENTY)
    before = site.number("SELECT count(*) FROM shop.orders")
    usage, worked = site.usage(), Usage({"worker": partial(family, worker)})
    began = time.monotonic()
    publishing = contest.pool.submit(_publish, urls.redis, purchases)
    site.wait(
        lambda: site.number("SELECT count(*) FROM shop.orders") - before >= purchases, f"{purchases:,} tasks of a peer"
    )
    seconds = time.monotonic() - began
    used, by_worker = usage.read(), worked.read()
    return Sample(
        purchases,
        seconds,
        cpu={"buyers": publishing.result(), **by_worker.cpu, **used.cpu},
        memory={**by_worker.memory, **used.memory},
    )


def _publish(broker: str, purchases: int) -> float:
    """Returns the processor seconds it took."""
    before = time.process_time()
    celery_task.publish(broker, "hot", purchases)
    return time.process_time() - before
