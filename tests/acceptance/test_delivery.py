"""`FAIRLANE_DELIVERY=purchase`: a message per purchase, each one visible, decided as the lanes are.

The sweep does not run here, so the messages alone bring every purchase to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from ops.embedded import EmbeddedServers
from tests.acceptance.service import Service, eventually, running_service
from tests.acceptance.shop import FINAL_WITHIN, Shop


@pytest.fixture
def per_purchase(servers: EmbeddedServers, project_root: Path, tmp_path: Path) -> Iterator[Service]:
    lines = ("web", "lanes", "charges")
    with running_service(servers, tmp_path, project_root / "Procfile", lines, FAIRLANE_DELIVERY="purchase") as running:
        yield running


@pytest.fixture
async def buyer(per_purchase: Service) -> AsyncIterator[Shop]:
    async with aiohttp.ClientSession() as session:
        yield Shop(session, per_purchase.url)


async def test_every_purchase_is_a_task_of_its_own(per_purchase: Service, buyer: Shop) -> None:
    await buyer.put_item("mug", stock=12)
    replies = await asyncio.gather(*(buyer.buy("mug", key=f"k-{number}") for number in range(30)))
    ids = [reply.body["id"] for reply in replies if reply.status == 202]
    assert len(ids) >= 12
    assert {reply.slug for reply in replies if reply.status != 202} <= {"sold-out", "queue-full"}

    ends = [(await buyer.final(purchase_id))["status"] for purchase_id in ids]
    assert ends.count("confirmed") == 12
    assert ends.count("sold_out") == len(ids) - 12
    sold = [row["id"] for row in per_purchase.purchases("mug")][:12]
    assert sorted(charge["reference"] for charge in per_purchase.ledger(*ids)) == sorted(sold)

    lanes = per_purchase.processes["lanes"]
    for purchase_id in ids:
        done = f"Task purchases.decide[{purchase_id}] succeeded"
        eventually(lambda done=done: done in lanes.logs(), FINAL_WITHIN, f"“{done}” in the log of the lanes")
