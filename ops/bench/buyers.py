"""The buyers of a peer: threads in processes, each buying again as soon as it has bought."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate

import psutil

from ops.bench.peers.conditional_update import SEGMENTS, SegmentSeller, UpdateSeller
from ops.bench.peers.redis_lock import LockSeller, PromptLockSeller
from ops.bench.peers.row_lock import RowLockSeller
from ops.bench.peers.shop import Seller, Urls

#: Threads of all buyers together: of 8, 16 and 32 the best for most peers on two cores, and for none far from it.
THREADS = 16
#: With a payment. Within the lock one buyer at a time pays and others only wait; outside of it they pay side by side.
_PAYING_INSIDE, _PAYING_OUTSIDE = 8, 32
#: Processes they are spread over, as one Python process uses one core.
PROCESSES = 2
#: Until all connections are open.
_OPEN_WITHIN = 0.3


@dataclass(frozen=True, slots=True)
class Peer:
    """What a shop could use instead: its name in the tables, how it sells, and over how many rows an item is spread.

    `paying` are its buyers when each purchase has a payment.
    """

    name: str
    open: Callable[[Urls], Seller]
    segments: int = 1
    paying: int = THREADS


LOCK = Peer("Redis lock, defaults", LockSeller, paying=_PAYING_INSIDE)
PROMPT_LOCK = Peer("Redis lock, polled every 10 ms", PromptLockSeller, paying=_PAYING_INSIDE)
ROW_LOCK = Peer("SELECT … FOR UPDATE", RowLockSeller, paying=_PAYING_INSIDE)
UPDATE = Peer("conditional UPDATE", UpdateSeller, paying=_PAYING_OUTSIDE)
TEN_ROWS = Peer("stock in ten segments", SegmentSeller, segments=SEGMENTS)
PEERS = (LOCK, PROMPT_LOCK, ROW_LOCK, UPDATE, TEN_ROWS)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for: items with their weights (all alike without), for so long or until so many tries were made."""

    skus: Sequence[str]
    weights: Sequence[float] | None = None
    seconds: float = 60.0
    tries: int | None = None


@dataclass
class Bought:
    """What the buyers of one process, or of all, came to."""

    sold: int = 0
    refused: int = 0
    began: float = 0.0
    ended: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    latencies: list[float] = field(default_factory=list)


def be_ready() -> None:
    """Wait until every process of the pool has one of these: then all have imported what they need."""
    time.sleep(_OPEN_WITHIN)


def rush(pool: ProcessPoolExecutor, peer: Peer, urls: Urls, demand: Demand) -> Bought:
    """Let the buyers at it, all at the same moment. Blocks until the last is done."""
    start_at = time.monotonic() + _OPEN_WITHIN
    count = (peer.paying if urls.payment else THREADS) // PROCESSES
    runs = [pool.submit(_buy_in_process, peer, urls, demand, count, start_at, seed) for seed in range(PROCESSES)]
    parts = [run.result() for run in runs]
    return Bought(
        sold=sum(part.sold for part in parts),
        refused=sum(part.refused for part in parts),
        began=min(part.began for part in parts),
        ended=max(part.ended for part in parts),
        cpu=sum(part.cpu for part in parts),
        memory=sum(part.memory for part in parts),
        latencies=[latency for part in parts for latency in part.latencies],
    )


def _buy_in_process(peer: Peer, urls: Urls, demand: Demand, count: int, start_at: float, seed: int) -> Bought:
    sellers = [peer.open(urls) for _ in range(count)]
    bought = Bought(began=max(start_at, time.monotonic()))
    counting = threading.Lock()
    tries = iter(range(demand.tries // PROCESSES)) if demand.tries is not None else iter(int, 1)
    cumulative = list(accumulate(demand.weights)) if demand.weights else None

    def buy(seller: Seller, number: int) -> None:
        choose = random.Random(f"{seed}.{number}")
        sold = refused = 0
        latencies = []
        time.sleep(max(0.0, start_at - time.monotonic()))
        ends = bought.began + demand.seconds
        while (now := time.monotonic()) < ends:
            with counting:
                if next(tries, None) is None:
                    break
            sku = choose.choices(demand.skus, cum_weights=cumulative)[0]
            if seller.buy(sku, f"c-{seed}-{number}"):
                sold += 1
                latencies.append(time.monotonic() - now)
            else:
                refused += 1
        with counting:
            bought.sold += sold
            bought.refused += refused
            bought.latencies += latencies
            bought.ended = max(bought.ended, time.monotonic())

    before = time.process_time()
    threads = [threading.Thread(target=buy, args=(seller, number)) for number, seller in enumerate(sellers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bought.cpu = time.process_time() - before
    bought.memory = int(psutil.Process(os.getpid()).memory_full_info().uss)
    for seller in sellers:
        seller.close()
    return bought
