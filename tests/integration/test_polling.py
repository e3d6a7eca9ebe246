"""A crowd that polls: Postgres is hardly asked. `tests/load/polling.py` measures the same with a large one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.integration.http_calls import SHOP
from tests.integration.serving import serving
from tests.integration.shopfloor import Shop
from tests.integration.test_waiting import queued


@contextmanager
def statements(engine: AsyncEngine) -> Iterator[list[str]]:
    """The statements that this engine runs meanwhile."""
    run: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        run.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        yield run
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)


async def test_five_hundred_queued_purchases_are_polled_without_asking_postgres(shop: Shop) -> None:
    bought = await queued(shop, 500)
    await shop.sweep().run_once()
    # No status is believed for its youth: only the lane's watermark speaks for it.
    settings = shop.with_settings(status_fresh=0.001)
    timeout = aiohttp.ClientTimeout(total=20)
    async with serving(settings) as api, aiohttp.ClientSession(headers=SHOP, timeout=timeout) as session:
        with statements(api.parts.engine) as run:

            async def poll(purchase_id: str) -> str:
                async with session.get(f"{api.url}/v1/purchases/{purchase_id}") as reply:
                    return str((await reply.json())["status"])

            for _ in range(2):
                assert set(await asyncio.gather(*(poll(record.id) for record in bought))) == {"queued"}
        assert run == []
        # And what nobody can believe is asked for in groups.
        shop.plain_redis.flushall()
        with statements(api.parts.engine) as run:
            assert set(await asyncio.gather(*(poll(record.id) for record in bought))) == {"queued"}
        assert 0 < len(run) < 500 / 5
