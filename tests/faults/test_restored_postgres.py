"""Postgres came back without its last intent (a restore, a failover that lost commits) while that call still runs.

The purchase then looks unpaid, and its fence is given out a second time. The narrow lock is all that stands between it
and a second charge: the first test shows it in the provider's books, the second one takes the lock away as well.

The provider is stopped while the first call lies in its socket, so that "still running" is no matter of luck.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from ops.sandbox import ProviderProcess
from shared import keys
from shared.purchases import PurchaseRecord
from tests.integration.shopfloor import Shop, until
from workers.charge import Charged
from workers.gateways import HttpGateway

#: What a claim writes, and what a restore therefore takes back.
CLAIMED_TABLES = ("purchases", "charge_attempts")


class Backup:
    """The rows of these tables and the fence sequence, as they were when it was made."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._tables: dict[str, bytes] = {}
        with psycopg.connect(database_url) as connection:
            for table in CLAIMED_TABLES:
                copy = sql.SQL("COPY fairlane.{} TO STDOUT").format(sql.Identifier(table))
                with connection.cursor().copy(copy) as rows:
                    self._tables[table] = b"".join(rows)
            fences = connection.execute("SELECT last_value, is_called FROM fairlane.fence_seq").fetchone()
            assert fences is not None
            self._fences = fences

    def restore(self) -> None:
        """Put it all back, in one transaction, as a restored server would come back."""
        with psycopg.connect(self._url) as connection:
            names = sql.SQL(", ").join(sql.Identifier("fairlane", table) for table in CLAIMED_TABLES)
            connection.execute(sql.SQL("TRUNCATE {}").format(names))
            for table, rows in self._tables.items():
                copy = sql.SQL("COPY fairlane.{} FROM STDIN").format(sql.Identifier(table))
                with connection.cursor().copy(copy) as writing:
                    writing.write(rows)
            connection.execute("SELECT setval('fairlane.fence_seq', %s, %s)", self._fences)


@dataclass
class Scene:
    """A purchase whose call is under way, and a Postgres that knows nothing of it."""

    shop: Shop
    provider: ProviderProcess
    bought: PurchaseRecord
    first: asyncio.Task[Charged]
    fence: int

    async def another_worker(self) -> Charged:
        """Another charge worker comes by once."""
        async with gateway_to(self.provider) as gateway:
            return await self.shop.charger(gateway, engine=self.shop.another_engine(), worker="worker-2").drain()

    async def due_again(self) -> None:
        """Return when the next worker will claim it."""
        due = "SELECT 1 FROM fairlane.purchases WHERE status = 'reserved' AND due_at <= now()"
        await until(lambda: bool(self.shop.sql(due)))

    def provider_goes_on(self) -> None:
        assert self.provider.pid is not None
        os.kill(self.provider.pid, signal.SIGCONT)

    @property
    def posts(self) -> int:
        """How often the provider was asked to charge for the purchase."""
        url = f"{self.provider.url}/ledger/posts?reference={self.bought.id}"
        with urllib.request.urlopen(url, timeout=20) as reply:  # noqa: S310  # a URL of this test
            return int(json.load(reply)["posts"])

    @property
    def charges(self) -> list[str]:
        """What it charged for the purchase, by its own books."""
        charges = [json.loads(line) for line in self.provider.ledger_file.read_text().splitlines()]
        return [charge["id"] for charge in charges if charge["reference"] == self.bought.id]


@asynccontextmanager
async def gateway_to(provider: ProviderProcess) -> AsyncIterator[HttpGateway]:
    gateway = HttpGateway(provider.url, call_timeout=20, connections=4)
    try:
        yield gateway
    finally:
        await gateway.close()


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path / "provider", latency=0.01) as running:
        yield running


@pytest.fixture
async def scene(shop: Shop, provider: ProviderProcess) -> AsyncIterator[Scene]:
    shop.settings = shop.with_settings(charge_retry=0.001)  # what was not sent is due again at once
    await shop.item()
    (bought,) = await shop.hold(shop.order(payment_token="tok_visa"))
    backup = Backup(shop.database_url)
    assert provider.pid is not None
    os.kill(provider.pid, signal.SIGSTOP)
    try:
        async with gateway_to(provider) as gateway:
            # With one slot it claims once, and does not come by again.
            charger = shop.charger(
                gateway, settings=shop.with_settings(charge_slots=1), engine=shop.another_engine(), worker="worker-1"
            )
            locked = asyncio.Event()
            first = asyncio.create_task(charger.drain(locked.is_set))
            await until(lambda: bool(shop.plain_redis.exists(keys.charge_lock(bought.id))))
            locked.set()
            fence = shop.purchase(bought)["fence"]
            assert shop.status(bought) == "charging"
            backup.restore()
            row = shop.purchase(bought)
            assert (row["status"], row["attempt"], shop.attempts()) == ("reserved", 0, [])
            yield Scene(shop, provider, bought, first, fence)
            await asyncio.wait([first])
    finally:
        os.kill(provider.pid, signal.SIGCONT)


async def test_while_the_call_runs_the_narrow_lock_alone_prevents_a_second_charge(scene: Scene) -> None:
    shop = scene.shop
    second = await scene.another_worker()

    assert (second.claimed, second.not_sent) == (1, 1)
    (attempt,) = shop.attempts()
    # The fence would not have helped: the second worker was given the same.
    assert (attempt["worker"], attempt["fence"]) == ("worker-2", scene.fence)
    row = shop.purchase(scene.bought)
    assert (row["status"], row["reason"]) == ("reserved", "lock_not_obtained")
    await scene.due_again()
    assert (await scene.another_worker()).not_sent == 1  # as often as it tries
    scene.provider_goes_on()
    await scene.first
    assert scene.posts == 1
    assert len(scene.charges) == 1


@pytest.mark.parametrize("tries", [0, 1, 2])
async def test_when_the_call_ends_the_purchase_is_paid_for_and_charged_no_more(scene: Scene, tries: int) -> None:
    shop = scene.shop
    for _ in range(tries):
        await scene.due_again()
        assert (await scene.another_worker()).not_sent == 1
    scene.provider_goes_on()
    await scene.first

    (charge,) = scene.charges
    row = shop.purchase(scene.bought)
    assert (row["status"], row["charge_id"], shop.stock()) == ("confirmed", charge, (9, 0, 1))
    assert (await scene.another_worker()).claimed == 0
    assert scene.posts == 1


async def test_without_the_lock_as_well_nothing_prevents_it(scene: Scene) -> None:
    # Redis lost its data together with Postgres: docs/failures.md says so under "What cannot be excluded".
    shop = scene.shop
    first_owner = shop.plain_redis.getdel(keys.charge_lock(scene.bought.id))
    second = asyncio.create_task(scene.another_worker())
    await until(lambda: bool(shop.plain_redis.exists(keys.charge_lock(scene.bought.id))))
    second_owner = shop.plain_redis.get(keys.charge_lock(scene.bought.id))
    assert str(first_owner).startswith(f"worker-1:{scene.fence}:")
    assert str(second_owner).startswith(f"worker-2:{scene.fence}:")
    scene.provider_goes_on()
    await asyncio.gather(scene.first, second)

    assert scene.posts == 2
    assert len(scene.charges) == 2
    row = shop.purchase(scene.bought)
    assert (row["status"], shop.stock()) == ("confirmed", (9, 0, 1))  # sold once all the same
    assert row["charge_id"] in scene.charges
