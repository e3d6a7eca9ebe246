"""Redis killed, cut short, emptied, full and stalled while a sale runs: nothing there is the only copy of anything.

Each fault hits a sale in its middle and lasts until buyers felt it. Meanwhile a buyer hears 503 or what is so, never
anything else: nobody is refused who could have been served, and a purchase that is over is told from Postgres.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.faults.crowd import Crowd
from tests.faults.floor import Floor
from tests.faults.sale import BOUND, FELT, felt, sale, until

#: Longer than every timeout on Redis: the longest is Celery's on the broker, five times `REDIS_TIMEOUT`.
STALL = 6.5


def valkey(floor: Floor) -> Redis:
    """A client that never waits long, and never asks twice."""
    retry = Retry(NoBackoff(), 0)
    return Redis.from_url(floor.valkey.url, socket_timeout=0.5, socket_connect_timeout=0.5, retry=retry)


def answers(floor: Floor) -> bool:
    with valkey(floor) as client:
        try:
            return bool(client.ping())
        except RedisError:
            return False


async def felt_and_told_right(floor: Floor, buyers: Crowd, sku: str) -> None:
    """Return when buyers have been told 503, and a purchase that is over was still told right."""
    # The first of them: while Redis takes no writes, a younger one may be told as it was two seconds ago.
    paid = floor.rows(
        "SELECT id, charge_id FROM fairlane.purchases WHERE item = %s AND status = 'confirmed' ORDER BY finished_at",
        sku,
    )[0]
    headers = {"Authorization": "Bearer shop-secret"}
    timeout = aiohttp.ClientTimeout(total=BOUND)
    url = f"{floor.url}/v1/purchases/{paid['id'].hex}"
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, headers=headers) as reply:
        told = await reply.json()
    assert (reply.status, told.get("status"), told.get("charge_id")) == (200, "confirmed", paid["charge_id"])
    await felt(buyers, "503")


def last_log(floor: Floor) -> Path:
    """The newest file of the append-only log."""
    folder = floor.valkey.log.parent / "data" / "appendonlydir"
    return max(folder.glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))


def keep_all(floor: Floor) -> None:
    """Its append-only log is whole."""


def cut_the_tail(floor: Floor) -> None:
    """The last third of the log is gone, down to the middle of a command."""
    path = last_log(floor)
    content = path.read_bytes()
    command = content.rindex(b"\r\n*", 0, len(content) * 2 // 3) + 2
    os.truncate(path, command + 3)


def remove(floor: Floor) -> None:
    """The log is gone."""
    folder = last_log(floor).parent
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("lose", [keep_all, cut_the_tail, remove])
async def test_killed_and_started_again(floor: Floor, sku: str, lose: Callable[[Floor], None]) -> None:
    async with sale(floor, sku) as buyers:
        with valkey(floor) as client:
            assert client.set(f"written-last:{sku}", "1")
            if lose is keep_all:
                # What is acknowledged may still be in its memory, for up to two seconds while the disk is busy.
                await until(lambda: client.execute_command("WAITAOF", 1, 0, 100)[0] == 1, "the write in the log")
        pid = floor.valkey.pid
        await asyncio.to_thread(floor.valkey.kill)
        assert not answers(floor)
        lose(floor)
        await felt_and_told_right(floor, buyers, sku)
        assert "503" in buyers.troubles
        read_from = floor.valkey.log.stat().st_size
        await asyncio.to_thread(floor.valkey.start)
        assert floor.valkey.pid != pid
        said = floor.valkey.log.read_bytes()[read_from:].decode()
        assert ("aof-load-truncated" in said) == (lose is cut_the_tail), said
        with valkey(floor) as client:
            assert client.exists(f"written-last:{sku}") == (lose is keep_all)


async def test_flushed_again_and_again(floor: Floor, sku: str) -> None:
    wiped: list[int] = []
    async with sale(floor, sku) as buyers:
        with valkey(floor) as client:
            for _ in range(8):
                accepted = len(buyers.accepted)
                wiped.append(int(client.dbsize()))
                client.flushall()
                await until(lambda accepted=accepted: len(buyers.accepted) >= accepted + 8, "a sale that goes on")  # type: ignore[misc]
    assert sum(keys > 0 for keys in wiped) >= 6, wiped


async def test_out_of_memory(floor: Floor, sku: str) -> None:
    def refused(client: Redis) -> int:
        return int(client.info("errorstats").get("errorstat_OOM", {}).get("count", 0))

    async with sale(floor, sku) as buyers:
        with valkey(floor) as client:
            before = refused(client)
            client.config_set("maxmemory", "1")
            try:
                await felt_and_told_right(floor, buyers, sku)
                # Buyers that are judged together share a command, and so its refusal.
                await until(lambda: refused(client) >= before + FELT, "as many refusals by the server")
                assert set(buyers.troubles) == {"503"}
            finally:
                client.config_set("maxmemory", "0")


async def test_every_connection_cut_again_and_again(floor: Floor, sku: str) -> None:
    cut = 0
    async with sale(floor, sku) as buyers:
        with valkey(floor) as client:
            for _ in range(12):
                accepted = len(buyers.accepted)
                cut += int(client.execute_command("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes"))
                await until(lambda accepted=accepted: len(buyers.accepted) >= accepted + 5, "a sale that goes on")  # type: ignore[misc]
    assert cut >= 60, cut


@asynccontextmanager
async def paused(floor: Floor) -> AsyncIterator[None]:
    """It takes commands and answers none, by itself, for `STALL` seconds."""
    with valkey(floor) as client:
        client.execute_command("CLIENT PAUSE", int(STALL * 1000), "ALL")
    yield


@asynccontextmanager
async def frozen(floor: Floor) -> AsyncIterator[None]:
    """Its process stands still."""
    assert floor.valkey.pid is not None
    process = psutil.Process(floor.valkey.pid)
    process.send_signal(signal.SIGSTOP)
    try:
        await until(lambda: process.status() == psutil.STATUS_STOPPED, "a server that stands still")
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("stall", [paused, frozen])
async def test_stalled_for_longer_than_every_timeout(
    floor: Floor, sku: str, stall: Callable[[Floor], AsyncIterator[None]]
) -> None:
    async with sale(floor, sku) as buyers:
        began = time.monotonic()
        async with stall(floor):  # type: ignore[attr-defined]
            assert not answers(floor)
            await felt_and_told_right(floor, buyers, sku)
            await asyncio.sleep(began + STALL - 0.7 - time.monotonic())  # the fault is that it lasts
            assert not answers(floor)
            await asyncio.sleep(began + STALL - time.monotonic())
        await until(lambda: answers(floor), "a server that answers")
