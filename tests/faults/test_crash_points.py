"""A process dies before or after every one of its effects, and what was accepted still ends as it should.

The processes run here, on the real servers; a crash is an exception that nothing in them catches, and their work in
memory is thrown away. Then time passes (deadlines, leases and locks run out), and new processes carry on.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from producers.cancel import Cancelled
from shared.crash_points import POINTS, armed
from shared.routing import lane_of
from shared.states import FINAL
from tests.integration.shopfloor import Shop, until
from workers.gateways import Capabilities, ChargeOutcome, ChargeRecord, ChargeRequest, Confirmed, Declined

#: Of six buyers, one of whom cannot pay and one of whom cancels, four get the four units.
BUYERS, STOCK = 6, 4

#: A round ends what can be ended without waiting; after a crash a purchase may need one to be found, one to be asked
#: about and one to be charged again.
ROUNDS = 6


class Crash(BaseException):
    """The process is gone."""


class Bomb:
    """Crashes the first time a point is passed."""

    def __init__(self, point: str) -> None:
        self._point = point
        self.went_off = False

    def __call__(self, name: str) -> None:
        if name == self._point and not self.went_off:
            self.went_off = True
            raise Crash(name)


class Provider:
    """A payment provider with a ledger. It makes a new charge at every call, as real ones do."""

    capabilities = Capabilities(deduplicates=False, can_find=True)

    def __init__(self) -> None:
        self.ledger: list[tuple[str, ChargeRecord]] = []

    async def charge(self, request: ChargeRequest, *, start_by: float) -> ChargeOutcome:
        status = "declined" if request.payment_token == "tok_declined" else "succeeded"
        record = ChargeRecord(f"ch_{len(self.ledger)}", status)
        self.ledger.append((request.reference, record))
        await asyncio.sleep(0)
        return Confirmed(record.id) if status == "succeeded" else Declined("no_money", record.id)

    async def find(self, reference: str) -> list[ChargeRecord]:
        return [record for name, record in self.ledger if name == reference]

    async def close(self) -> None:
        return


class World:
    """The sale: its buyers, who repeat their requests, and its processes, which may die."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.provider = Provider()
        self.orders = [
            shop.order(customer=f"c-{n}", payment_token="tok_declined" if n == 1 else "tok_visa") for n in range(BUYERS)
        ]

    async def live(self) -> None:
        """One life of every process: buyers ask, the sweep looks, lanes are decided, the first buyer calls it off,
        charges are made and asked about."""
        first, *_ = await self.shop.buy(*self.orders)
        for _ in range(3):
            await self.shop.sweep().run_once()
            with self.shop.decider() as decider:
                await asyncio.to_thread(decider.drain, lane_of("sku-1", self.shop.settings.lanes))
            canceller = self.shop.canceller()
            assert isinstance(await canceller.cancel(first.client, first.id), Cancelled)
            await canceller.close()
            await self.shop.charger(self.provider).drain()
            await self.shop.reconciler(self.provider).run_once()

    async def live_until(self, bomb: Bomb) -> None:
        with armed(bomb):
            life = asyncio.create_task(self.live())
            await until(lambda: bomb.went_off or life.done())
            # All of the process at once: a drain that is cancelled waits for its calls, and these for their outcomes.
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in others:
                    task.cancel()
                await asyncio.wait(others, timeout=1)
            if not life.cancelled() and (error := life.exception()) and not isinstance(error, Crash):
                raise error

    def let_time_pass(self) -> None:
        """Two minutes: claims are overdue and settled, leases are over, locks and marks have expired."""
        self.shop.sql("UPDATE fairlane.purchases SET call_deadline = call_deadline - interval '2 minutes'")
        self.shop.sql("UPDATE fairlane.purchases SET ask_at = now() WHERE status = 'in_doubt'")
        for pattern in ("fairlane:lock:*", "fairlane:called:*"):
            for key in self.shop.plain_redis.scan_iter(pattern):
                self.shop.plain_redis.delete(key)

    @property
    def over(self) -> bool:
        rows = self.shop.purchases()
        return len(rows) == BUYERS and all(row["status"] in FINAL for row in rows)


@pytest.fixture
def _connections_die_with_their_process() -> Iterator[None]:
    """Whoever crashes closes nothing. What is left of it is collected before the next test, which would be blamed."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:The garbage collector is trying to clean up")
@pytest.mark.usefixtures("_connections_die_with_their_process")
@pytest.mark.parametrize("point", sorted(POINTS))
async def test_whoever_dies_there_loses_nothing(shop: Shop, point: str) -> None:
    await shop.item(stock=STOCK)
    world = World(shop)
    bomb = Bomb(point)
    await world.live_until(bomb)
    assert bomb.went_off
    for _ in range(ROUNDS):
        world.let_time_pass()
        await world.live()
        if world.over:
            break

    assert world.over, shop.statuses()
    assert len({row["idempotency_key"] for row in shop.purchases()}) == BUYERS
    assert Counter(shop.statuses())["confirmed"] == STOCK
    assert shop.stock() == (0, 0, STOCK)
    assert Counter(shop.statuses())["cancelled"] == 1
    charged = Counter(name for name, record in world.provider.ledger if record.status == "succeeded")
    assert charged == {row["id"].hex: 1 for row in shop.purchases() if row["status"] == "confirmed"}
