"""Traffic at an API: closed loops, open loops and whole checkouts. Each function runs in a process of the pool."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import psutil
import uvloop
from redis.asyncio import Redis

from ops.bench.http_client import Answer, Client
from shared import keys

#: Seconds after which a run that ought to be over has failed.
_WITHIN = 60.0
#: Between two looks at the statuses that were said to have changed, in seconds: what is measured is as exact as that.
_LOOK_EVERY = 0.001
_FINAL = frozenset({"confirmed", "declined", "sold_out", "limit_reached", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Target:
    """The API and who calls it; `path` is what is asked for, a POST of purchases of `sku` if there is none."""

    url: str
    api_key: str
    sku: str = "hot"
    path: str | None = None
    connections: int = 64


@dataclass
class Measured:
    """What a run came to. `seconds` is from the first request to the last answer."""

    count: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    polls: int = 0
    cpu: float = 0.0
    memory: int = 0


def closed_loop(target: Target, seconds: float) -> Measured:
    """Each connection sends the next request as soon as it has an answer."""
    return _run(_closed_loop(target, seconds))


def open_loop(target: Target, redis_url: str, rate: float, seconds: float) -> Measured:
    """So many purchases a second, whatever the answers do; the latency is from each 202 to its decision.

    A decision is seen in Redis, where it is written after its commit.
    """
    return _run(_open_loop(target, redis_url, rate, seconds))


def checkouts(target: Target, buyers: int, seconds: float, pause: float) -> Measured:
    """`buyers` at a time buy, ask after `pause` seconds, and again, until they know how it ended; then the next comes.

    Counted is who heard of the end between the first third of the time and its end; the latency is from the request to
    the answer that says so.
    """
    return _run(_checkouts(target, buyers, seconds, pause))


def crowd(target: Target, buyers: int) -> Measured:
    """So many buyers at once, over the connections there are; the latency is from the beginning to each answer."""
    return _run(_crowd(target, buyers))


def _run(work: Coroutine[Any, Any, Measured]) -> Measured:
    before = time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        measured = runner.run(asyncio.wait_for(work, _WITHIN))
    measured.cpu = time.process_time() - before
    measured.memory = int(psutil.Process(os.getpid()).memory_full_info().uss)
    return measured


class _Requests:
    """Makes requests, each purchase under a key of its own."""

    def __init__(self, target: Target) -> None:
        at = urlsplit(target.url)
        self.host, self.port = at.hostname or "", at.port or 80
        self._common = f"Host: {at.netloc}\r\nAuthorization: Bearer {target.api_key}\r\n"
        self._target = target
        self._run = uuid.uuid4().hex[:12]
        self._numbers = count()
        self._fixed = self.get(target.path) if target.path is not None else None

    def next(self) -> bytes:
        """The next request of a closed or an open loop."""
        return self._fixed or self.purchase()

    def get(self, path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\n{self._common}\r\n".encode()

    def purchase(self) -> bytes:
        number = next(self._numbers)
        body = (
            f'{{"item":"{self._target.sku}","quantity":1,"customer":"c-{self._run}-{number}",'
            '"payment_token":"tok_visa"}'
        )
        return (
            f"POST /v1/purchases HTTP/1.1\r\n{self._common}Content-Type: application/json\r\n"
            f"Idempotency-Key: {self._run}-{number}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()


async def _client(target: Target, requests: _Requests) -> Client:
    client = Client(requests.host, requests.port, target.connections)
    await client.open()
    return client


async def _closed_loop(target: Target, seconds: float) -> Measured:
    requests, measured, done = _Requests(target), Measured(), asyncio.Event()
    client = await _client(target, requests)
    began = time.monotonic()
    ends = began + seconds
    running = target.connections

    def start() -> None:
        sent = time.monotonic()

        def on_answer(answer: Answer) -> None:
            nonlocal running
            now = time.monotonic()
            measured.latencies.append(now - sent)
            measured.statuses[answer.status] += 1
            if now < ends:
                start()
            else:
                running -= 1
                if not running:
                    done.set()

        client.send(requests.next(), on_answer)

    for _ in range(target.connections):
        start()
    await client.wait(done)
    measured.seconds = time.monotonic() - began
    measured.count = len(measured.latencies)
    client.close()
    return measured


async def _crowd(target: Target, buyers: int) -> Measured:
    requests, measured, done = _Requests(target), Measured(), asyncio.Event()
    client = await _client(target, requests)
    began = time.monotonic()

    def on_answer(answer: Answer) -> None:
        measured.latencies.append(time.monotonic() - began)
        measured.statuses[answer.status] += 1
        if len(measured.latencies) == buyers:
            done.set()

    for _ in range(buyers):
        client.send(requests.purchase(), on_answer)
    await client.wait(done)
    measured.seconds = time.monotonic() - began
    measured.count = buyers
    client.close()
    return measured


async def _every(rate: float, seconds: float, act: Callable[[], None]) -> None:
    """Act `rate` times a second. What a late turn of the loop missed is made up for at once."""
    began = time.monotonic()
    for number in range(int(rate * seconds)):
        if (pause := began + number / rate - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        act()


async def _open_loop(target: Target, redis_url: str, rate: float, seconds: float) -> Measured:
    requests, measured, done = _Requests(target), Measured(), asyncio.Event()
    client = await _client(target, requests)
    watch = _Watch(redis_url)
    expected = int(rate * seconds)
    watching = asyncio.create_task(watch.run())
    await watch.ready.wait()

    def on_answer(answer: Answer) -> None:
        measured.statuses[answer.status] += 1
        measured.count += 1
        if answer.status == 202:
            watch.accepted(json.loads(answer.body)["id"])
        if measured.count == expected:
            done.set()

    began = time.monotonic()
    await _every(rate, seconds, lambda: client.send(requests.purchase(), on_answer))
    await client.wait(done)
    measured.seconds = time.monotonic() - began
    while not watch.answered.keys() <= watch.decided.keys():  # noqa: ASYNC110  # any message may decide the last of them
        await asyncio.sleep(_LOOK_EVERY)
    watching.cancel()
    client.close()
    # A decision may be seen before its 202 is: the answer travels, too.
    measured.latencies = [max(0.0, watch.decided[purchase] - at) for purchase, at in watch.answered.items()]
    return measured


class _Watch:
    """Notes when each purchase of ours is first seen in Redis in another state than queued.

    Of the purchases of others, of which a busy lane has thousands a second, only the names are heard: whoever measures
    must not be a burden that the buyers are not.
    """

    def __init__(self, redis_url: str) -> None:
        self._url = redis_url
        self._heard: set[str] = set()
        self._to_look_at: asyncio.Queue[tuple[float, list[str]]] = asyncio.Queue()
        self.answered: dict[str, float] = {}
        self.decided: dict[str, float] = {}
        self.ready = asyncio.Event()

    def accepted(self, purchase: str) -> None:
        """Ours from now on. If something was heard of it already, that may have been its decision."""
        now = self.answered[purchase] = time.monotonic()
        if purchase in self._heard:
            self._to_look_at.put_nowait((now, [purchase]))

    async def run(self) -> None:
        """Until cancelled."""
        async with Redis.from_url(self._url) as redis, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(redis))
            tasks.create_task(self._look(redis))

    async def _listen(self, redis: Redis) -> None:
        async with redis.pubsub() as subscription:
            await subscription.subscribe(keys.CHANGED)
            self.ready.set()
            async for message in subscription.listen():
                if message["type"] == "message":
                    ids = message["data"].decode().split()
                    self._heard.update(ids)
                    self._to_look_at.put_nowait((time.monotonic(), ids))

    async def _look(self, redis: Redis) -> None:
        while True:
            heard, ids = await self._to_look_at.get()
            ours = [each for each in ids if each in self.answered and each not in self.decided]
            for purchase, status in zip(ours, await redis.mget(map(keys.purchase, ours)) if ours else (), strict=True):
                if status is not None and b'"status":"queued"' not in status:
                    self.decided[purchase] = heard


async def _checkouts(target: Target, buyers: int, seconds: float, pause: float) -> Measured:
    requests, measured, done = _Requests(target), Measured(), asyncio.Event()
    client = await _client(target, requests)
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    counted_from, ends = began + seconds / 3, began + seconds
    running = buyers

    def buy() -> None:
        nonlocal running
        sent = time.monotonic()
        if sent >= ends:
            running -= 1
            if not running:
                done.set()
            return

        def on_accepted(answer: Answer) -> None:
            measured.statuses[answer.status] += 1
            if answer.status != 202:
                loop.call_later(pause, buy)
                return
            path = f"/v1/purchases/{json.loads(answer.body)['id']}"
            ask(requests.get(path), 0)

        def ask(request: bytes, asked: int) -> None:
            loop.call_later(pause, lambda: client.send(request, lambda answer: on_status(request, asked + 1, answer)))

        def on_status(request: bytes, asked: int, answer: Answer) -> None:
            status = json.loads(answer.body).get("status", "")
            now = time.monotonic()
            # Two polls each, however quick it went: that is what clients do.
            if asked < 2 or status not in _FINAL:
                ask(request, asked)
                return
            measured.ends[status] += 1
            if counted_from <= now < ends:
                measured.count += 1
                measured.polls += asked
                measured.latencies.append(now - sent)
            buy()

        client.send(requests.purchase(), on_accepted)

    for number in range(buyers):
        # Spread over a pause: they do not all come in one moment again and again.
        loop.call_later(pause * number / buyers, buy)
    await client.wait(done)
    measured.seconds = ends - counted_from
    client.close()
    return measured
