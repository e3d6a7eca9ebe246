"""Every transaction that writes has its limits: a process that stalls in the middle of one wedges nothing."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from ops.catalogue import Line, import_catalogue
from shared.database import transaction
from shared.items import ItemTerms
from tests.integration.shopfloor import ScriptedGateway, Shop
from workers.gateways import Confirmed
from workers.sweep import Sweep

Work = Callable[[Shop], Coroutine[Any, Any, Any]]


async def _accept(shop: Shop) -> None:
    await shop.buy(shop.order())


async def _decide(shop: Shop) -> None:
    await shop.hold(shop.order())


async def _charge(shop: Shop) -> None:
    await shop.hold(shop.order())
    assert (await shop.charger(ScriptedGateway(Confirmed("ch_1"))).drain()).confirmed == 1


async def _sweep(shop: Shop) -> None:
    assert (await Sweep(shop.engine, shop.redis, shop.caller, shop.settings).run_once()).ours


async def _import(shop: Shop) -> None:
    terms = ItemTerms(name="Cup", stock=1, price=1, currency="EUR")
    await import_catalogue([Line(2, "cup", terms)], shop.settings)


@pytest.mark.parametrize("work", [_accept, _decide, _charge, _sweep, _import])
async def test_whoever_writes_sets_its_limits_first(shop: Shop, work: Work) -> None:
    await shop.item()
    first: list[str] = []
    began: set[int] = set()

    def on_begin(connection: Any) -> None:
        began.add(id(connection))

    def on_statement(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if id(connection) in began:
            began.discard(id(connection))
            first.append(statement)

    event.listen(Engine, "begin", on_begin)
    event.listen(Engine, "before_cursor_execute", on_statement)
    try:
        await work(shop)
    finally:
        event.remove(Engine, "begin", on_begin)
        event.remove(Engine, "before_cursor_execute", on_statement)
    assert first
    assert [statement for statement in first if "idle_in_transaction_session_timeout" not in statement] == []


async def test_the_limits_are_those_of_the_settings_and_end_with_the_transaction(shop: Shop) -> None:
    settings = shop.with_settings(idle_in_transaction_timeout=1.5)
    engine = shop.another_engine(settings)
    async with transaction(engine, settings) as connection:
        shown = await connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout")
        assert shown.scalar_one() == "1500ms"
    async with engine.connect() as connection:
        shown = await connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout")
        assert shown.scalar_one() == "0"
