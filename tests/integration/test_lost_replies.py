"""A command ran and its reply was lost: whoever asked again gets what was done, and nothing is done twice.

The shop reaches Redis and Postgres by way of proxies. Each drops the reply to one chosen command, after the server ran
it, and breaks the connection. Every test shows that a reply was dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import count
from secrets import token_hex

import msgspec.structs
import pytest
import structlog.testing
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy.exc import OperationalError

from producers.admit import Admission, Verdict
from shared import keys
from shared.errors import UnavailableError
from shared.narrow_lock import Lock, NarrowLock
from shared.purchases import PurchaseRecord
from shared.redis_clients import script
from shared.routing import CHARGES_QUEUE, lane_of, queue_of
from shared.settings import Settings
from tests.integration.conftest import RunApi
from tests.integration.http_calls import ADMIN, SHOP, Answer, assert_problem, call
from tests.integration.shopfloor import ScriptedGateway, Shop, accepted, knock, open_shop, until
from tests.processes.proxy import Proxy
from workers.gateways import ChargeOutcome, ChargeRequest, Confirmed, Declined, InDoubt, NotSent

OVERDUE = "UPDATE fairlane.purchases SET call_deadline = now() - interval '1 second'"
SETTLED = "UPDATE fairlane.purchases SET call_deadline = now() - interval '61 seconds', ask_at = now()"


def is_commit(request: bytes) -> bool:
    """As psycopg sends it: a simple query."""
    return request.startswith(b"Q") and b"COMMIT" in request


def runs(name: str, request: bytes) -> bool:
    """Whether this asks Redis to run that script: its text is sent whole."""
    return script(name).encode() in request


@dataclass(frozen=True)
class Line:
    """A shop all of whose connections go through two proxies."""

    shop: Shop
    redis: Proxy
    postgres: Proxy

    def lose_commit(self) -> None:
        """The next commit happens, and nobody hears of it."""
        self.postgres.drop_reply(is_commit)

    def lose_script(self, name: str) -> None:
        """The next run of this script happens, and nobody hears of it."""
        self.redis.drop_reply(lambda request: runs(name, request))

    def lose_mark(self, queue: str) -> None:
        """The next pipeline that marks this queue as called runs, and nobody hears of it."""
        mark = keys.called(queue).encode()
        self.redis.drop_reply(lambda request: b"SET" in request and mark in request)


@pytest.fixture
def proxies(settings: Settings) -> Iterator[tuple[Proxy, Proxy]]:
    with Proxy.to(settings.redis_url) as to_redis, Proxy.to(settings.database_url) as to_postgres:
        yield to_redis, to_postgres


@pytest.fixture
async def line(settings: Settings, proxies: tuple[Proxy, Proxy]) -> AsyncIterator[Line]:
    to_redis, to_postgres = proxies
    changes = {
        "redis_url": to_redis.url(settings.redis_url),
        "database_url": to_postgres.url(settings.database_url),
        "charge_retry": 0.001,  # a purchase that was not sent is due again at once
    }
    async with open_shop(Settings.model_validate({**settings.model_dump(), **changes})) as shop:
        yield Line(shop, to_redis, to_postgres)


async def held(shop: Shop) -> PurchaseRecord:
    """One purchase with a hold, due to be charged; ten units, and no call out."""
    await shop.item()
    (record,) = await shop.hold(shop.order())
    shop.forget_calls()
    return record


class TestTheNarrowLock:
    async def test_who_asks_again_is_told_that_it_is_theirs(self, line: Line) -> None:
        lock = NarrowLock(line.shop.redis, ttl=60)
        ours, theirs = (Lock("fairlane:lock:charge:1", owner) for owner in ("worker-1:7:a", "worker-2:8:b"))
        line.lose_script("lock_acquire")
        with pytest.raises(RedisConnectionError):
            await lock.acquire([ours])
        assert line.redis.dropped == 1
        assert line.shop.plain_redis.get(ours.key) == ours.owner

        assert await lock.acquire([theirs]) == [False]
        assert await lock.acquire([ours]) == [True]

    async def test_a_charger_that_was_not_told_sends_nothing_and_gives_the_lock_back(self, line: Line) -> None:
        shop = line.shop
        bought = await held(shop)
        line.lose_script("lock_acquire")
        gateway = ScriptedGateway()
        charged = await shop.charger(gateway).drain()

        assert line.redis.dropped == 1
        assert (charged.claimed, charged.not_sent, gateway.requests) == (1, 1, [])
        assert shop.status(bought) == "reserved"
        assert not shop.plain_redis.exists(keys.charge_lock(bought.id))
        await until(lambda: bool(shop.sql("SELECT 1 FROM fairlane.purchases WHERE due_at <= now()")))
        assert (await shop.charger(gateway, worker="worker-2").drain()).confirmed == 1
        assert gateway.references == [bought.id]
        assert shop.stock() == (9, 0, 1)

    async def test_a_release_that_nobody_heard_of_is_a_release(self, line: Line) -> None:
        shop = line.shop
        bought = await held(shop)
        line.lose_script("delete_if_equal")
        assert (await shop.charger(ScriptedGateway()).drain()).confirmed == 1
        assert line.redis.dropped == 1
        assert not shop.plain_redis.exists(keys.charge_lock(bought.id))


class TestTheDoor:
    async def test_who_was_let_in_and_not_told_is_let_in_again(self, line: Line) -> None:
        shop = line.shop
        await shop.item()
        admission = Admission(shop.engine, shop.redis, shop.settings)
        assert await knock(admission, "another") is Verdict.OPEN  # the door record is there
        line.lose_script("admit")
        with pytest.raises(UnavailableError):
            await knock(admission, "key")
        assert line.redis.dropped == 1

        shop.plain_redis.hset(keys.item("sku-1"), "within_reach", 0)  # others took it all meanwhile
        assert await knock(admission, "new") is Verdict.SOLD_OUT
        assert await knock(admission, "key") is Verdict.KNOWN

    async def test_the_api_says_503_and_a_retry_gets_the_purchase(
        self, environment: dict[str, str], line: Line, run_api: RunApi
    ) -> None:
        through = {
            "FAIRLANE_REDIS_URL": line.redis.url(environment["FAIRLANE_REDIS_URL"]),
            "FAIRLANE_DATABASE_URL": line.postgres.url(environment["FAIRLANE_DATABASE_URL"]),
        }
        body = {"item": "sku-1", "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}
        with run_api(environment | through) as url:

            async def buy(key: str) -> Answer:
                return await call("POST", f"{url}/v1/purchases", {**SHOP, "Idempotency-Key": key}, body)

            terms = {"name": "A thing", "stock": 2, "price": 500, "currency": "EUR"}
            assert (await call("PUT", f"{url}/v1/items/sku-1", ADMIN, terms)).status in {200, 201}

            # With the count there, the purchase's commit is the first.
            line.shop.plain_redis.set(keys.waiting("sku-1"), 0)
            line.lose_commit()
            assert_problem(await buy("key-1"), 503, "unavailable")
            assert line.postgres.dropped == 1
            (row,) = line.shop.purchases()
            again = await buy("key-1")
            assert (again.status, again.json["id"]) == (202, row["id"].hex)
            assert again.headers["Idempotent-Replayed"] == "true"

            line.lose_script("admit")
            assert_problem(await buy("key-2"), 503, "unavailable")
            assert line.redis.dropped == 1
            assert (await buy("key-2")).status == 202
        assert [row["idempotency_key"] for row in line.shop.purchases()] == ["key-1", "key-2"]


class TestCommits:
    async def test_a_retry_gets_the_purchase_of_an_unheard_commit(self, line: Line) -> None:
        shop = line.shop
        await shop.item()
        acceptor = shop.acceptor()
        orders = [shop.order() for _ in range(3)]
        line.lose_commit()
        answers = await asyncio.gather(*map(acceptor.accept, orders), return_exceptions=True)
        assert line.postgres.dropped == 1
        assert [type(answer) for answer in answers] == [UnavailableError] * 3
        made = shop.purchases()
        assert [row["idempotency_key"] for row in made] == [order.key for order in orders]
        assert not shop.called(queue_of(made[0]["lane"]))

        for order in orders:
            again = accepted(await acceptor.accept(msgspec.structs.replace(order, id=token_hex(16))))
            assert again.replayed
            assert again.record.id == order.id
        assert shop.purchases() == made
        await shop.sweep().run_once()  # nobody called the lane
        assert len(shop.messages(queue_of(made[0]["lane"]))) == 1

    async def test_a_decision_is_made_once_and_the_next_finds_it_made(self, line: Line) -> None:
        shop = line.shop
        await shop.item()
        (bought,) = await shop.buy(shop.order(quantity=3))
        shop.forget_calls()
        lane = lane_of("sku-1", shop.settings.lanes)
        line.lose_commit()
        with shop.decider() as decider:
            with pytest.raises(OperationalError):
                await asyncio.to_thread(decider.drain, lane)
            assert line.postgres.dropped == 1
            after = shop.purchase(bought)
            assert (after["status"], shop.stock()) == ("reserved", (7, 3, 0))

            again = await asyncio.to_thread(decider.drain, lane)  # the same worker, on a new connection
        assert (again.decided, again.reserved) == (0, 0)
        assert (shop.purchase(bought), shop.stock()) == (after, (7, 3, 0))
        assert shop.messages(CHARGES_QUEUE) == []
        await shop.sweep().run_once()  # the charges were not called
        assert len(shop.messages(CHARGES_QUEUE)) == 1

    async def test_a_claim_that_nobody_heard_of_is_called_for_once_in_the_end(self, line: Line) -> None:
        shop = line.shop
        bought = await held(shop)
        gateway = ScriptedGateway()
        gateway.records = {}  # the provider knows of no charge
        charger = shop.charger(gateway)
        line.lose_commit()
        with pytest.raises(OperationalError):
            await charger.drain()
        assert line.postgres.dropped == 1
        assert (shop.status(bought), len(shop.attempts()), gateway.requests) == ("charging", 1, [])
        # Nobody may call while that intent stands, not even who made it and does not know.
        assert (await charger.drain()).claimed == 0

        shop.sql(OVERDUE)
        assert len((await shop.sweep().run_once()).in_doubt) == 1
        shop.sql(SETTLED)
        assert (await shop.reconciler(gateway).run_once()).settled == 1
        assert (shop.status(bought), shop.stock()) == ("reserved", (9, 1, 0))
        assert (await charger.drain()).confirmed == 1  # its slot was not lost either
        assert gateway.references == [bought.id]
        assert [attempt["outcome"] for attempt in shop.attempts()] == ["not_charged", "confirmed"]
        assert (shop.status(bought), shop.stock()) == ("confirmed", (9, 0, 1))

    @pytest.mark.parametrize(
        ("outcome", "status", "stock"),
        [
            (Confirmed("ch_1"), "confirmed", (0, 0, 1)),
            (Declined("no_money"), "declined", (1, 0, 0)),
            (NotSent("unreachable", retry_after=600), "reserved", (0, 1, 0)),
            (InDoubt("timeout"), "in_doubt", (0, 1, 0)),
        ],
        ids=["confirmed", "declined", "not-sent", "in-doubt"],
    )
    async def test_an_outcome_counts_once(
        self, line: Line, outcome: ChargeOutcome, status: str, stock: tuple[int, int, int]
    ) -> None:
        shop = line.shop
        await shop.item(stock=1)
        bought, waiting = await shop.hold(shop.order(), shop.order())
        shop.forget_calls()

        async def answer(request: ChargeRequest) -> ChargeOutcome:
            line.lose_commit()
            return outcome

        gateway = ScriptedGateway(answer)
        with structlog.testing.capture_logs() as logs:
            charged = await shop.charger(gateway, settings=shop.with_settings(charge_slots=1)).drain()
        assert line.postgres.dropped == 1
        assert charged.claimed == len(gateway.requests) == 1
        assert (shop.status(bought), shop.stock()) == (status, stock)
        assert len(shop.attempts()) == 1
        # It is told what was recorded, as by a recording that was heard of: the lock is free, the waitlist is called.
        assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == []
        assert not shop.plain_redis.exists(keys.charge_lock(bought.id))
        assert f'"status":"{status}"' in str(shop.plain_redis.get(keys.purchase(bought.id)))
        assert len(shop.messages(queue_of(waiting.lane))) == (status in {"confirmed", "declined"})

    async def test_an_ended_hold_returns_its_stock_once(self, line: Line) -> None:
        shop = line.shop
        bought = await held(shop)
        shop.sql("UPDATE fairlane.purchases SET expires_at = now()")
        sweep, commits = shop.sweep(), count()
        # A round commits what it found first, then the holds it ended.
        line.postgres.drop_reply(lambda request: is_commit(request) and next(commits) == 1)
        assert (await sweep.run_once()).expired == ()
        assert line.postgres.dropped == 1
        assert (shop.status(bought), shop.stock()) == ("expired", (10, 0, 0))
        await sweep.run_once()
        assert (shop.status(bought), shop.stock()) == ("expired", (10, 0, 0))


class TestCalls:
    """After a commit Redis is told and somebody is called. The mark of a call stands, and no message was sent."""

    def mark_expires(self, shop: Shop, queue: str) -> None:
        """Its life is over: nobody honoured the call."""
        assert shop.called(queue)
        assert shop.messages(queue) == []
        shop.plain_redis.delete(keys.called(queue))

    async def test_of_a_lane_by_who_accepted(self, line: Line) -> None:
        shop = line.shop
        await shop.item()
        queue = queue_of(lane_of("sku-1", shop.settings.lanes))
        line.lose_mark(queue)
        (bought,) = await shop.buy(shop.order())
        assert line.redis.dropped == 1
        assert shop.status(bought) == "queued"

        self.mark_expires(shop, queue)
        await shop.sweep().run_once()
        assert len(shop.messages(queue)) == 1

    async def test_of_the_charges_by_who_decided(self, line: Line) -> None:
        shop = line.shop
        await shop.item()
        await shop.buy(shop.order())
        line.lose_mark(CHARGES_QUEUE)
        with shop.decider() as decider:
            assert (await asyncio.to_thread(decider.drain, lane_of("sku-1", shop.settings.lanes))).reserved == 1
        assert line.redis.dropped == 1

        self.mark_expires(shop, CHARGES_QUEUE)
        await shop.sweep().run_once()
        assert len(shop.messages(CHARGES_QUEUE)) == 1

    async def test_of_a_waitlists_lane_by_who_recorded(self, line: Line) -> None:
        shop = line.shop
        await shop.item(stock=1)
        first, second = await shop.hold(shop.order(), shop.order())
        assert (shop.status(first), shop.status(second)) == ("reserved", "waitlisted")
        shop.forget_calls()
        queue = queue_of(first.lane)
        line.lose_mark(queue)
        charged = await shop.charger(ScriptedGateway(Declined("no_money"))).drain()
        assert charged.declined == 1
        assert line.redis.dropped == 1

        self.mark_expires(shop, queue)
        await shop.sweep().run_once()
        assert len(shop.messages(queue)) == 1

    async def test_of_a_message_that_arrived_no_second_one_is_sent(self, line: Line) -> None:
        shop = line.shop
        await shop.item()
        queue = queue_of(lane_of("sku-1", shop.settings.lanes))
        line.redis.drop_reply(lambda request: b"LPUSH" in request and queue.encode() in request)
        await shop.buy(shop.order())
        assert line.redis.dropped == 1
        assert not shop.called(queue)  # taken back, as nobody knew

        await shop.sweep().run_once()
        assert shop.called(queue)
        assert len(shop.messages(queue)) == 1
