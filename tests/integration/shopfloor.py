"""A small shop on real servers: items, orders, deciders and chargers as the processes make them, a view of the rows.

What a test looks at, it reads over a connection of its own, so it sees only what was committed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from itertools import count
from typing import Any

import psycopg
import redis
import redis.asyncio
from celery import Celery
from kombu import pools
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncEngine

from producers import admit
from producers.accept import Acceptance, Accepted, Acceptor, Order
from producers.admit import Admission, Verdict
from producers.cancel import Canceller
from shared import items, keys
from shared.calling import Caller, make_celery
from shared.database import make_async_engine, make_engine, transaction
from shared.items import ItemTerms, Saved
from shared.narrow_lock import Lock, NarrowLock
from shared.purchases import PurchaseRecord
from shared.redis_clients import make_async_redis, make_redis
from shared.settings import Settings
from shared.statements import charge as charge_sql
from shared.states import Status
from workers.charge import Charger
from workers.decide import Decider
from workers.gateways import (
    Capabilities,
    ChargeOutcome,
    ChargeRecord,
    ChargeRequest,
    Confirmed,
    Gateway,
    GatewayUnavailable,
)
from workers.reconcile import Reconciler
from workers.record import Claim, Recorder
from workers.sweep import Sweep

#: Seconds a condition may take on a loaded machine. Healthy ones take milliseconds.
BOUND = 20.0

#: Nobody listens on the discard port: a connection is refused at once.
NOBODY_LISTENS = "redis://127.0.0.1:9/0"


class Shop:
    """One installation: its settings, its connections, and the short ways to do what its processes do."""

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self.settings = settings
        self._stack = stack
        self._numbers = count(1)
        self.database_url = settings.database_url.replace("+psycopg", "")
        self.view = stack.enter_context(psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row))
        self.engine = self.another_engine()
        self.redis = make_async_redis(settings)
        stack.push_async_callback(self.redis.aclose)
        self.plain_redis = make_redis(settings)
        stack.callback(self.plain_redis.close)
        self.celery = self.another_celery(settings)
        self.caller = Caller(settings, self.celery, self.plain_redis)

    def with_settings(self, **changes: Any) -> Settings:
        """These settings with some changed, checked as at a start."""
        return Settings.model_validate({**self.settings.model_dump(), **changes})

    def another_engine(self, settings: Settings | None = None) -> AsyncEngine:
        """An engine of its own, as another process would have."""
        engine = make_async_engine(settings or self.settings)
        self._stack.push_async_callback(engine.dispose)
        return engine

    def another_celery(self, settings: Settings) -> Celery:
        """A Celery app of its own, closed with the shop."""
        app = make_celery(settings)
        self._stack.callback(close_celery, app)
        return app

    def redis_that_is_down(self) -> redis.asyncio.Redis:
        """A client whose server is not there."""
        client = make_async_redis(self.with_settings(redis_url=NOBODY_LISTENS))
        self._stack.push_async_callback(client.aclose)
        return client

    # What the shop sells

    async def item(self, sku: str = "sku-1", **terms: Any) -> Saved:
        """Create or change an item; ten units for 5.00 EUR unless said otherwise."""
        values = {"name": sku, "stock": 10, "price": 500, "currency": "EUR", **terms}
        async with transaction(self.engine, self.settings) as connection:
            return await items.save(connection, sku, ItemTerms(**values), self.settings)

    def order(self, item: str = "sku-1", quantity: int = 1, **named: Any) -> Order:
        """A request to buy, with a key of its own unless one is given."""
        number = next(self._numbers)
        values = {"client": "shop", "key": f"key-{number}", "customer": f"c-{number}", "payment_token": "tok_secret"}
        return Order(item=item, quantity=quantity, **{**values, **named})

    def acceptor(self, settings: Settings | None = None, engine: AsyncEngine | None = None) -> Acceptor:
        """An acceptor as an API process has it; its work is finished before the shop closes."""
        acceptor = Acceptor(engine or self.engine, self.redis, self.caller, settings or self.settings)
        self._stack.push_async_callback(acceptor.close)
        return acceptor

    def canceller(
        self,
        settings: Settings | None = None,
        *,
        engine: AsyncEngine | None = None,
        client: redis.asyncio.Redis | None = None,
    ) -> Canceller:
        """A canceller as an API process has it; its calls are finished before the shop closes."""
        canceller = Canceller(engine or self.engine, client or self.redis, self.caller, settings or self.settings)
        self._stack.push_async_callback(canceller.close)
        return canceller

    async def buy(self, *orders: Order) -> list[PurchaseRecord]:
        """Accept these orders in this order, and wait until their statuses and calls are out."""
        acceptor = self.acceptor()
        answers: list[Acceptance] = await asyncio.gather(*(acceptor.accept(order) for order in orders))
        await acceptor.close()
        return [accepted(answer).record for answer in answers]

    async def buy_one_by_one(self, *orders: Order) -> list[PurchaseRecord]:
        """The same in commits of their own."""
        return [(await self.buy(order))[0] for order in orders]

    async def hold(self, *orders: Order) -> list[PurchaseRecord]:
        """Accept these orders and decide their lanes: they get stock if there is some."""
        records = await self.buy(*orders)
        with self.decider(self.with_settings(decide_slice=60)) as decider:
            for lane in sorted({record.lane for record in records}):
                await asyncio.to_thread(decider.drain, lane)
        return records

    # The processes

    @contextmanager
    def decider(self, settings: Settings | None = None) -> Iterator[Decider]:
        """A decider with connections of its own, as a worker process has it."""
        used = settings or self.settings
        with ExitStack() as stack:
            engine = make_engine(used)
            stack.callback(engine.dispose)
            client = make_redis(used)
            stack.callback(client.close)
            yield Decider(engine, client, Caller(used, self.celery, client), used)

    def charger(
        self,
        gateway: Gateway,
        *,
        settings: Settings | None = None,
        client: redis.asyncio.Redis | None = None,
        engine: AsyncEngine | None = None,
        worker: str = "worker-1",
    ) -> Charger:
        """A charger as a charge process has it."""
        return Charger(
            engine or self.engine, client or self.redis, gateway, self.caller, settings or self.settings, worker
        )

    def reconciler(self, gateway: Gateway, settings: Settings | None = None) -> Reconciler:
        """A reconciler as a charge process has it."""
        used = settings or self.settings
        recorder = Recorder(self.engine, self.redis, self.caller, used)
        return Reconciler(self.engine, self.redis, gateway, recorder, used, "worker-1")

    def sweep(self) -> Sweep:
        """The sweep."""
        return Sweep(self.engine, self.redis, self.caller, self.settings)

    def recorder(self) -> Recorder:
        """A recorder on the shop's own connections."""
        return Recorder(self.engine, self.redis, self.caller, self.settings)

    async def claim(self, slots: int = 100, worker: str = "worker-1") -> list[Claim]:
        """Claim what is due, as a charger does, and take the narrow locks; the calls are not made."""
        values = {"slots": slots, "worker": worker, "overdue_after": self.settings.overdue_after}
        async with transaction(self.engine, self.settings) as connection:
            rows = (await connection.execute(charge_sql.CLAIM, values)).mappings().all()
        claims = [
            Claim(
                PurchaseRecord.from_row(row),
                row["attempt"],
                row["fence"],
                row["call_deadline"],
                worker,
                row["payment_token"],
            )
            for row in rows
        ]
        locks: list[Lock] = [claim.lock for claim in claims]
        await NarrowLock(self.redis, self.settings.charge_lock_ttl).acquire(locks)
        return claims

    # What was committed

    def sql(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a statement, run on the connection that only looks (or sets a scene)."""
        cursor = self.view.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def purchases(self) -> list[dict[str, Any]]:
        """Every purchase, in order of `seq`."""
        return self.sql("SELECT * FROM fairlane.purchases ORDER BY seq")

    def purchase(self, record: PurchaseRecord) -> dict[str, Any]:
        """One purchase as it stands now."""
        (row,) = self.sql("SELECT * FROM fairlane.purchases WHERE id = %s", record.id)
        return row

    def statuses(self) -> list[str]:
        """The status of every purchase, in order of `seq`."""
        return [row["status"] for row in self.purchases()]

    def status(self, record: PurchaseRecord) -> str:
        """The status of one purchase."""
        return str(self.purchase(record)["status"])

    def stock(self, sku: str = "sku-1") -> tuple[int, int, int]:
        """(available, unpaid, sold) of an item."""
        (row,) = self.sql("SELECT stock, available, unpaid FROM fairlane.items WHERE sku = %s", sku)
        return row["available"], row["unpaid"], row["stock"] - row["available"] - row["unpaid"]

    def attempts(self) -> list[dict[str, Any]]:
        """Every attempt to charge, in order of acceptance, and of one purchase in its own."""
        return self.sql(
            "SELECT a.* FROM fairlane.charge_attempts a JOIN fairlane.purchases p ON p.id = a.purchase_id"
            " ORDER BY p.seq, a.attempt"
        )

    # What Redis holds

    def messages(self, queue: str) -> list[dict[str, Any]]:
        """The messages of a queue, oldest first, each with its body decoded under `decoded`."""
        found = []
        for text in reversed(self.plain_redis.lrange(queue, 0, -1)):
            message = json.loads(text)
            found.append(message | {"decoded": json.loads(base64.b64decode(message["body"]))})
        return found

    def called(self, queue: str) -> bool:
        """Whether the mark stands that somebody was called to this queue."""
        return bool(self.plain_redis.exists(keys.called(queue)))

    def forget_calls(self) -> None:
        """Empty Redis of all messages and marks, and of everything else."""
        self.plain_redis.flushall()

    # Waiting

    async def someone_waits_for_a_lock(self, sessions: int = 1) -> None:
        """Return once so many sessions of this database stand before somebody else's lock."""
        waiting = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND state = 'active'"
        )
        await until(lambda: len(self.sql(waiting)) >= sessions)

    @contextmanager
    def holding(self, statement: str, *values: Any) -> Iterator[psycopg.Connection]:
        """A transaction of somebody else that has run this statement and goes on until the block ends."""
        with psycopg.connect(self.database_url) as connection:
            connection.execute(statement.encode(), values)
            yield connection
            connection.rollback()


@asynccontextmanager
async def open_shop(settings: Settings) -> AsyncIterator[Shop]:
    """A shop with everything closed at the end."""
    async with AsyncExitStack() as stack:
        yield Shop(settings, stack)


async def until(condition: Callable[[], bool], bound: float = BOUND) -> None:
    """Return once the condition holds; AssertionError after `bound` seconds."""
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        await asyncio.sleep(0.01)


async def knock(
    admission: Admission,
    key: str,
    item: str = "sku-1",
    quantity: int = 1,
    *,
    client: str = "shop",
    customer: str = "c-1",
) -> Verdict:
    """What the door says to a request."""
    return (await admission.admit(admit.Request(client, key, item, quantity, customer))).verdict


def accepted(answer: Acceptance) -> Accepted:
    """The answer as an acceptance; fails if it is none."""
    assert isinstance(answer, Accepted), answer
    return answer


def close_celery(app: Celery) -> None:
    """Close every connection of an app. Its pools are kombu's, shared by all apps with the same broker."""
    app.close()
    pools.reset()


class ScriptedGateway:
    """A gateway whose answers the test writes. It counts calls, and how many were under way at once."""

    def __init__(
        self, answer: Callable[[ChargeRequest], Awaitable[ChargeOutcome]] | ChargeOutcome | None = None
    ) -> None:
        self._answer = answer
        self.requests: list[ChargeRequest] = []
        self.under_way = 0
        self.most_under_way = 0
        #: What `find` answers, by reference; None: no answer that can be trusted.
        self.records: dict[str, list[ChargeRecord]] | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(deduplicates=False, can_find=False)

    @property
    def references(self) -> list[str]:
        """Which purchases were called for, in order."""
        return [request.reference for request in self.requests]

    async def charge(self, request: ChargeRequest, *, start_by: float) -> ChargeOutcome:
        assert time.monotonic() < start_by
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self._answer is None:
                return Confirmed(f"ch_{request.reference}")
            return await self._answer(request) if callable(self._answer) else self._answer
        finally:
            self.under_way -= 1

    async def find(self, reference: str) -> list[ChargeRecord]:
        if self.records is None:
            raise GatewayUnavailable("this gateway answers no questions")
        return self.records.get(reference, [])

    async def close(self) -> None:
        return


def statuses_of(records: Sequence[PurchaseRecord], status: Status) -> list[str]:
    """The ids of those in this status."""
    return [record.id for record in records if record.status is status]
