"""Processes that are told to stop in the middle of something finish it first."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import psycopg

from ops.embedded.ports import free_port
from tests.acceptance.shop import Shop
from tests.faults.floor import Floor
from tests.faults.sale import BOUND, until

#: A commit may wait for so long here, so that everything else has happened by then. Below the statement's own limit.
LONG = "9"
#: Seconds after which a process that waited for nothing would have ended.
A_WHILE = 2
#: Statements that wait for a lock, and have been at it for more than so many seconds.
WAITING = (
    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'"
    " AND clock_timestamp() - query_start > make_interval(secs => %s)"
)


async def test_an_api_process_finishes_the_commit_under_way(floor: Floor, sku: str) -> None:
    floor.put_item(sku, 1)
    port = free_port()
    web = await asyncio.to_thread(
        floor.start, "web", name="web.2", env={"FAIRLANE_PORT": str(port), "FAIRLANE_LOCK_TIMEOUT": LONG}
    )

    def refuses() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) != 0

    try:
        async with aiohttp.ClientSession() as session:
            with psycopg.connect(floor.service.database_url) as somebody:
                # The new row refers to its item, and waits for whoever has that locked.
                somebody.execute("SELECT FROM fairlane.items WHERE sku = %s FOR UPDATE", [sku])
                buying = asyncio.create_task(Shop(session, floor.url_of("web.2")).buy(sku))
                await until(lambda: bool(floor.rows(WAITING, 0)), "a commit under way")
                web.terminate()
                await until(refuses, "no new connections")
                await until(lambda: bool(floor.rows(WAITING, A_WHILE)), "a commit that takes long")
                assert web.alive
                somebody.rollback()
            reply = await buying
        assert reply.status == 202, reply.body
        assert await asyncio.to_thread(web.wait_exit, BOUND) == 0
        [row] = floor.service.purchases(sku)
        assert row["id"] == reply.body["id"]
        # Nobody has called its lane, or it has been: it is decided either way.
        await until(lambda: floor.statuses(sku)["confirmed"] == 1, "a purchase that goes on")
    finally:
        floor.dismiss("web.2")
