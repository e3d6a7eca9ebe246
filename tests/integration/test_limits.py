"""Every transaction that writes has its limits: a process that stalls in the middle of one wedges nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from ops.catalogue import Line, import_catalogue
from shared.database import is_passing, transaction
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


async def test_a_server_that_does_not_answer_is_hung_up_on_and_asked_again_when_it_does(shop: Shop) -> None:
    settings = shop.with_settings(connection_timeout=0.5, statement_timeout=0.4)
    engine = shop.another_engine(settings)
    async with engine.connect() as connection:
        backend = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    os.kill(backend, signal.SIGSTOP)
    try:
        async with asyncio.timeout(60):  # for ever, without the hang-up
            with pytest.raises(OperationalError) as failure:
                async with transaction(engine, settings) as connection:
                    await connection.execute(text("SELECT 1"))
    finally:
        os.kill(backend, signal.SIGCONT)
    assert is_passing(failure.value)
    async with transaction(engine, settings) as connection:
        assert (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one() != backend


async def test_a_connection_given_back_in_time_is_kept(shop: Shop) -> None:
    settings = shop.with_settings(connection_timeout=0.5, statement_timeout=0.4)
    engine = shop.another_engine(settings)
    backends = set()
    for _ in range(4):
        async with transaction(engine, settings) as connection:
            backends.add((await connection.execute(text("SELECT pg_backend_pid() FROM pg_sleep(0.2)"))).scalar_one())
    assert len(backends) == 1
