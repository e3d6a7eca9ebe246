"""Postgres says that its disk is full: everything that writes fails for a while, and nothing is lost or done twice.

The server raises its own error (SQLSTATE 53100) from a trigger, in the place where it would have to grow a table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import OperationalError

from shared.database import cause
from shared.errors import UnavailableError
from shared.routing import lane_of
from tests.integration.shopfloor import ScriptedGateway, Shop, accepted, until
from workers.gateways import ChargeOutcome, ChargeRequest, Confirmed

DISK_FULL = "53100"

_FILL = """
CREATE OR REPLACE FUNCTION fairlane.no_space() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100';
END $$;
CREATE TRIGGER no_space BEFORE INSERT OR UPDATE ON fairlane.purchases
    FOR EACH STATEMENT EXECUTE FUNCTION fairlane.no_space();
"""
_MAKE_ROOM = "DROP TRIGGER no_space ON fairlane.purchases"


@contextmanager
def full_disk(shop: Shop) -> Iterator[None]:
    """No purchase can be written."""
    shop.sql(_FILL)
    yield
    shop.sql(_MAKE_ROOM)


async def test_orders_are_told_to_come_again_and_then_accepted(shop: Shop) -> None:
    await shop.item()
    acceptor, order = shop.acceptor(), shop.order()
    with full_disk(shop):
        with pytest.raises(UnavailableError) as refused:
            await acceptor.accept(order)
        assert refused.value.__cause__ is not None
        assert DISK_FULL in cause(refused.value.__cause__)
        assert shop.purchases() == []

    assert accepted(await acceptor.accept(order)).record.id == order.id


async def test_a_lane_is_decided_when_there_is_room_again(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    lane = lane_of("sku-1", shop.settings.lanes)
    with shop.decider() as decider:
        with full_disk(shop), pytest.raises(OperationalError) as failed:
            await asyncio.to_thread(decider.drain, lane)
        assert DISK_FULL in cause(failed.value)
        # Set aside is what cannot be decided; this could not be written.
        assert shop.status(bought) == "queued"
        await asyncio.to_thread(decider.drain, lane)
    assert shop.status(bought) == "reserved"


async def test_an_outcome_is_kept_until_there_is_room_again(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    called, answer = asyncio.Event(), asyncio.Event()

    async def charge(request: ChargeRequest) -> ChargeOutcome:
        called.set()
        await answer.wait()
        return Confirmed("ch_1")

    gateway = ScriptedGateway(charge)
    charging = asyncio.create_task(shop.charger(gateway).drain())
    await called.wait()
    with full_disk(shop):
        tries = "SELECT deadlocks, xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        before = shop.sql(tries)[0]["xact_rollback"]
        answer.set()
        await until(lambda: shop.sql(tries)[0]["xact_rollback"] >= before + 2)
        assert shop.status(bought) == "charging"
    # It looked for more to claim as well, and could not write that either.
    await asyncio.wait([charging])
    assert isinstance(charging.exception(), OperationalError)

    assert shop.status(bought) == "confirmed"
    assert gateway.references == [bought.id]
