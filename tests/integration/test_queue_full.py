"""The queue follows the stock: nobody is let in for whom nothing can be left, and what is counted wrong heals."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import event

from producers.admit import Admission, Request, Verdict
from shared import keys
from shared.settings import Settings
from shared.states import Status
from tests.integration.http_calls import SHOP, Answer, assert_problem, call
from tests.integration.serving import serving
from tests.integration.shopfloor import BOUND, ScriptedGateway, Shop, knock, until
from workers.gateways import Declined

#: A life of the counts that a test can wait for.
SOON = 0.3
#: So that nothing ends while the test keeps Postgres waiting.
PATIENT: dict[str, Any] = {"lock_timeout": 60, "statement_timeout": 60, "connection_timeout": 90, "door_ttl": 60}


def admission(shop: Shop, settings: Settings | None = None) -> Admission:
    return Admission(shop.engine, shop.redis, settings or shop.settings)


def waiting(shop: Shop, sku: str = "sku-1") -> int | None:
    """The count of the item's waiting units; None where nobody knows."""
    units = shop.plain_redis.get(keys.waiting(sku))
    return None if units is None else int(str(units))


def mark(shop: Shop, key: str) -> str:
    """The mark of a key; "" where there is none."""
    return str(shop.plain_redis.get(keys.seen("shop", key)) or "")


def in_postgres(shop: Shop, sku: str = "sku-1") -> int:
    """The units that wait in truth."""
    (row,) = shop.sql(
        "SELECT coalesce(sum(quantity), 0) AS units FROM fairlane.purchases"
        " WHERE item = %s AND status IN ('queued', 'waitlisted')",
        sku,
    )
    return int(row["units"])


async def let_in(judge: Admission, shop: Shop, *quantities: int) -> None:
    """Requests of these quantities are let in, accepted and decided."""
    orders = [shop.order(quantity=quantity) for quantity in quantities]
    for order in orders:
        assert await knock(judge, order.key, quantity=order.quantity) is Verdict.OPEN
    await shop.hold(*orders)


async def open_again(judge: Admission) -> None:
    """Return once somebody is let in. Who asks and is refused must not delay that, so somebody asks all the time."""
    deadline = time.monotonic() + BOUND
    number = 0
    while await knock(judge, f"again-{(number := number + 1)}") is not Verdict.OPEN:
        assert time.monotonic() < deadline, "refused for good"


class TestTheBound:
    async def test_no_more_units_are_let_in_than_are_within_reach(self, shop: Shop) -> None:
        await shop.item(stock=10)
        judge = admission(shop)
        wanted = [4, 4, 4, 2, 1]
        verdicts = [await knock(judge, f"k-{n}", quantity=quantity) for n, quantity in enumerate(wanted)]

        full, opened = Verdict.QUEUE_FULL, Verdict.OPEN
        assert verdicts == [opened, opened, full, opened, full]
        assert waiting(shop) == 10
        assert await knock(judge, "k-big", quantity=11) is Verdict.SOLD_OUT

    async def test_also_within_one_group(self, shop: Shop) -> None:
        await shop.item("a", stock=10)
        await shop.item("b", stock=20)
        judge = admission(shop)
        verdicts = await asyncio.gather(*(knock(judge, f"k-{n}", "ab"[n % 2]) for n in range(100)))

        assert verdicts[::2].count(Verdict.OPEN) == 10
        assert verdicts[1::2].count(Verdict.OPEN) == 20
        assert verdicts[:20:2] == [Verdict.OPEN] * 10, "the first to come are let in"
        assert (waiting(shop, "a"), waiting(shop, "b")) == (10, 20)

    async def test_by_all_api_processes_together(self, shop: Shop) -> None:
        await shop.item(stock=10)
        doors = [admission(shop) for _ in range(4)]
        verdicts = await asyncio.gather(*(knock(doors[n % 4], f"k-{n}") for n in range(60)))

        assert verdicts.count(Verdict.OPEN) == 10
        assert verdicts.count(Verdict.QUEUE_FULL) == 50

    async def test_a_refused_key_is_not_marked_and_its_units_do_not_wait(self, shop: Shop) -> None:
        await shop.item(stock=1)
        judge = admission(shop)
        assert [await knock(judge, key) for key in ("first", "second")] == [Verdict.OPEN, Verdict.QUEUE_FULL]

        assert shop.plain_redis.exists(keys.seen("shop", "second")) == 0
        assert waiting(shop) == 1

    async def test_who_is_refused_does_not_renew_the_count(self, shop: Shop) -> None:
        await shop.item(stock=1)
        judge = admission(shop, shop.with_settings(door_ttl=60))
        assert await knock(judge, "first") is Verdict.OPEN
        shop.plain_redis.expire(keys.waiting("sku-1"), 30)
        assert await knock(judge, "second") is Verdict.QUEUE_FULL
        assert 0 < shop.plain_redis.ttl(keys.waiting("sku-1")) <= 30

        shop.plain_redis.set(keys.waiting("sku-1"), 0, ex=30)
        assert await knock(judge, "third") is Verdict.OPEN
        assert 30 < shop.plain_redis.ttl(keys.waiting("sku-1")) <= 60


class TestUnitsThatWaitNoLonger:
    async def test_a_decision_makes_room(self, shop: Shop) -> None:
        await shop.item(stock=3)
        judge = admission(shop)
        await let_in(judge, shop, 2, 1)
        assert shop.stock() == (0, 3, 0)
        assert waiting(shop) == 0
        # Three units are held and not paid: as many may wait for them.
        assert [await knock(judge, f"w-{n}") for n in range(4)] == [Verdict.OPEN] * 3 + [Verdict.QUEUE_FULL]

    async def test_the_waitlist_waits_until_it_is_settled(self, shop: Shop) -> None:
        await shop.item(stock=1)
        judge = admission(shop)
        await let_in(judge, shop, 1)
        await let_in(judge, shop, 1)
        assert shop.statuses() == ["reserved", "waitlisted"]
        assert waiting(shop) == 1
        assert await knock(judge, "third") is Verdict.QUEUE_FULL

        await shop.charger(ScriptedGateway()).drain()
        with shop.decider() as decider:
            decider.drain(shop.purchases()[1]["lane"])
        # Nobody got stock, so no door record is written; its units wait no longer all the same.
        assert shop.statuses() == ["confirmed", "sold_out"]
        assert waiting(shop) == 0
        assert await knock(judge, "third") is Verdict.SOLD_OUT

    async def test_a_declined_payment_opens_the_door_again(self, shop: Shop) -> None:
        await shop.item(stock=1)
        judge = admission(shop)
        await let_in(judge, shop, 1)
        await shop.charger(ScriptedGateway(Declined("card_declined"))).drain()

        assert await knock(judge, "second") is Verdict.OPEN

    async def test_the_count_is_never_below_zero(self, shop: Shop) -> None:
        await shop.item(stock=10)
        shop.plain_redis.set(keys.waiting("sku-1"), 1)
        await shop.hold(shop.order(quantity=3))

        assert waiting(shop) == 0

    async def test_a_count_that_is_gone_stays_away(self, shop: Shop) -> None:
        await shop.item(stock=10)
        await shop.hold(shop.order(quantity=3))

        assert waiting(shop) is None


class TestOrdersThatAreNotRecorded:
    async def test_their_units_are_given_back_and_their_key_is_new_again(self, shop: Shop) -> None:
        await shop.item(stock=2)
        judge = admission(shop)
        refused = Request("shop", "k", "sku-1", 2, "c-1")
        assert (await judge.admit(refused)).verdict is Verdict.OPEN
        await judge.give_back(refused, forget=True)

        assert waiting(shop) == 0
        assert [await knock(judge, "other", quantity=2), await knock(judge, "k")] == [Verdict.OPEN, Verdict.QUEUE_FULL]

    async def test_not_while_a_twin_stands_on_them(self, shop: Shop) -> None:
        await shop.item(stock=2)
        judge = admission(shop)
        order = Request("shop", "k", "sku-1", 2, "c-1")
        assert [(await judge.admit(order)).verdict for _ in range(2)] == [Verdict.OPEN, Verdict.KNOWN]
        await judge.give_back(order, forget=True)

        assert waiting(shop) == 2
        assert mark(shop, "k").startswith("1 "), "its twin may be being committed"
        await judge.give_back(order, forget=True)
        assert waiting(shop) == 0
        assert mark(shop, "k") == ""

    async def test_the_last_of_several_takes_off_what_the_first_had_added(self, shop: Shop) -> None:
        """Also if it asked for something else: its key was known, so nothing was counted for it."""
        await shop.item("a", stock=10)
        await shop.item("b", stock=10)
        judge = admission(shop)
        assert await knock(judge, "other", "a", 3) is Verdict.OPEN
        assert await knock(judge, "another", "b", 3) is Verdict.OPEN
        orders = [Request("shop", "k", "a", 2, "c-1"), Request("shop", "k", "b", 4, "c-1")]
        assert [(await judge.admit(order)).verdict for order in orders] == [Verdict.OPEN, Verdict.KNOWN]
        assert (waiting(shop, "a"), waiting(shop, "b")) == (5, 3)
        for order in orders:
            await judge.give_back(order, forget=False)
        assert (waiting(shop, "a"), waiting(shop, "b")) == (3, 3)
        assert mark(shop, "k") == "known"

    async def test_who_was_recorded_stands_on_its_units_whoever_comes_after(self, shop: Shop) -> None:
        await shop.item(stock=10)
        judge = admission(shop)
        order = Request("shop", "k", "sku-1", 2, "c-1")
        assert (await judge.admit(order)).verdict is Verdict.OPEN
        for _ in range(3):
            assert (await judge.admit(order)).verdict is Verdict.KNOWN
            await judge.give_back(order, forget=False)
        assert waiting(shop) == 2
        assert mark(shop, "k").startswith("1 ")

    async def test_a_purchase_without_units_of_its_key_gives_none_back(self, shop: Shop) -> None:
        await shop.item(stock=10)
        judge = admission(shop)
        order = Request("shop", "k", "sku-1", 2, "c-1")
        assert await knock(judge, "other", quantity=3) is Verdict.OPEN
        assert (await judge.admit(order)).verdict is Verdict.OPEN
        await judge.give_back(order, forget=False)
        for forget in (False, True):
            assert (await judge.admit(order)).verdict is Verdict.KNOWN
            await judge.give_back(order, forget=forget)
            assert waiting(shop) == 3
            assert mark(shop, "k") == "known"
        shop.plain_redis.delete(keys.seen("shop", "k"))
        await judge.give_back(order, forget=True)
        assert waiting(shop) == 3

    async def test_giving_back_does_not_prolong_the_mark(self, shop: Shop) -> None:
        await shop.item()
        judge = admission(shop)
        order = Request("shop", "k", "sku-1", 2, "c-1")
        for _ in range(2):
            await judge.admit(order)
        shop.plain_redis.expire(keys.seen("shop", "k"), 60)
        for left in ("1 ", "known"):
            await judge.give_back(order, forget=False)
            assert mark(shop, "k").startswith(left)
            assert 0 < shop.plain_redis.ttl(keys.seen("shop", "k")) <= 60

    async def test_a_twin_does_not_prolong_the_mark(self, shop: Shop) -> None:
        await shop.item()
        judge = admission(shop)
        assert await knock(judge, "k") is Verdict.OPEN
        shop.plain_redis.expire(keys.seen("shop", "k"), 60)
        assert await knock(judge, "k") is Verdict.KNOWN

        assert 0 < shop.plain_redis.ttl(keys.seen("shop", "k")) <= 60

    async def test_that_redis_is_away_costs_the_answer_nothing(self, shop: Shop) -> None:
        order = Request("shop", "k", "sku-1", 2, "c-1")
        await Admission(shop.engine, shop.redis_that_is_down(), shop.settings).give_back(order, forget=True)


class TestCountedAnew:
    async def test_a_missing_count_is_taken_from_postgres(self, shop: Shop) -> None:
        await shop.item(stock=5)
        await shop.hold(shop.order(quantity=3), shop.order(quantity=2), shop.order(quantity=1))
        await shop.buy(shop.order(quantity=2))
        assert shop.statuses() == ["reserved", "reserved", "waitlisted", "queued"]
        shop.plain_redis.flushall()
        judge = admission(shop)

        assert await knock(judge, "k-1", quantity=3) is Verdict.QUEUE_FULL
        assert waiting(shop) == in_postgres(shop) == 3
        assert 0 < shop.plain_redis.pttl(keys.waiting("sku-1")) <= shop.settings.door_ttl * 1000
        assert await knock(judge, "k-2", quantity=2) is Verdict.OPEN

    async def test_with_its_door_record_still_there(self, shop: Shop) -> None:
        await shop.item(stock=5)
        judge = admission(shop)
        await let_in(judge, shop, 5)
        await shop.buy(shop.order(quantity=4))
        shop.plain_redis.delete(keys.waiting("sku-1"))

        assert shop.plain_redis.exists(keys.item("sku-1"))
        assert await knock(judge, "k-1", quantity=2) is Verdict.QUEUE_FULL
        assert await knock(judge, "k-2", quantity=1) is Verdict.OPEN

    async def test_other_items_purchases_do_not_count(self, shop: Shop) -> None:
        await shop.item("a", stock=5)
        await shop.item("b", stock=5)
        await shop.buy(shop.order("a", 5))

        assert await knock(admission(shop), "k", "b", 5) is Verdict.OPEN

    async def test_a_count_that_is_there_is_not_replaced(self, shop: Shop) -> None:
        """It has units that Postgres does not show yet: those of orders on their way to their commit."""
        await shop.item(stock=5)
        judge = admission(shop)
        assert await knock(judge, "k-1", quantity=4) is Verdict.OPEN
        shop.plain_redis.delete(keys.item("sku-1"))

        assert await knock(judge, "k-2", quantity=2) is Verdict.QUEUE_FULL
        assert waiting(shop) == 4

    async def test_whoever_comes_while_it_is_being_counted_joins(self, shop: Shop) -> None:
        await shop.item(stock=500)
        engine = shop.another_engine(shop.with_settings(**PATIENT))
        counts: list[str] = []
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: counts.append(args[2]))
        judge = Admission(engine, shop.redis, shop.with_settings(**PATIENT))

        def judged() -> int:
            stats = shop.plain_redis.info("commandstats")
            return int(stats["cmdstat_eval"]["calls"])

        with shop.holding("LOCK TABLE fairlane.purchases IN ACCESS EXCLUSIVE MODE"):
            first = asyncio.create_task(knock(judge, "first"))
            await shop.someone_waits_for_a_lock()
            before = judged()
            others = [asyncio.create_task(knock(judge, f"k-{n}")) for n in range(50)]
            await until(lambda: judged() > before)
        assert set(await asyncio.gather(first, *others)) == {Verdict.OPEN}
        assert len([statement for statement in counts if "fairlane.purchases" in statement]) == 1
        assert waiting(shop) == 51


class TestHealing:
    async def test_a_count_that_is_too_high_refuses_nobody_for_longer_than_its_life(self, shop: Shop) -> None:
        await shop.item(stock=10)
        judge = admission(shop)
        # As if the process that let ten in had died before their commit.
        shop.plain_redis.set(keys.waiting("sku-1"), 10, ex=60)
        assert await knock(judge, "refused") is Verdict.QUEUE_FULL
        shop.plain_redis.pexpire(keys.waiting("sku-1"), int(SOON * 1000))

        await open_again(judge)
        assert waiting(shop) == in_postgres(shop) + 1

    async def test_after_a_flush_in_mid_sale_the_count_is_right_again(self, shop: Shop) -> None:
        """A flush may hit between any two steps: orders let in and not committed, verdicts committed and not told."""
        settings = shop.with_settings(door_ttl=SOON)
        await shop.item(stock=10)
        judge = admission(shop, settings)
        orders = [shop.order(quantity=2) for _ in range(5)]
        assert [await knock(judge, order.key, quantity=2) for order in orders] == [Verdict.OPEN] * 5
        records = await shop.buy(*orders[:3])
        shop.plain_redis.flushall()
        # Counted while the last two are on their way: too few, so two more are let in.
        more = [shop.order(quantity=2) for _ in range(2)]
        assert [await knock(judge, order.key, quantity=2) for order in more] == [Verdict.OPEN] * 2
        await shop.buy(*orders[3:], *more)
        with shop.decider(settings) as decider:
            decider.drain(records[0].lane)

        await until(lambda: waiting(shop) is None)
        judge = admission(shop)
        assert await knock(judge, "later", quantity=6) is Verdict.OPEN
        # Ten units are held, two purchases wait for them to fall back, and the one that was just let in.
        assert waiting(shop) == in_postgres(shop) + 6 == 10
        assert await knock(judge, "too-many") is Verdict.QUEUE_FULL

    async def test_during_an_outage_of_redis_nothing_of_a_decision_is_lost(self, shop: Shop) -> None:
        await shop.item(stock=10)
        settings = shop.with_settings(door_ttl=SOON)
        judge = admission(shop, settings)
        order = shop.order(quantity=10)
        assert await knock(judge, order.key, quantity=10) is Verdict.OPEN
        (record,) = await shop.buy(order)
        with shop.decider(shop.with_settings(redis_url="redis://127.0.0.1:9/0")) as decider:
            decider.drain(record.lane)
        assert shop.status(record) == Status.RESERVED

        # Nobody told the door; it finds out by itself.
        await open_again(judge)


class TestOverHttp:
    async def buy(self, url: str, key: str, quantity: int = 1, customer: str = "c-1") -> Answer:
        order = {"item": "sku-1", "quantity": quantity, "customer": customer, "payment_token": "tok_visa"}
        return await call("POST", f"{url}/v1/purchases", SHOP | {"Idempotency-Key": key}, order)

    async def test_a_full_queue_is_503_with_retry_after_and_a_known_key_is_answered(self, shop: Shop) -> None:
        await shop.item(stock=2)
        async with serving(shop.settings) as api:
            bought = await self.buy(api.url, "known", quantity=2)
            assert bought.status == 202
            refused = await self.buy(api.url, "new")
            assert_problem(refused, 503, "queue-full")
            assert refused.headers["Retry-After"] == "1"

            again = await self.buy(api.url, "known", quantity=2)
            assert (again.status, again.json["id"]) == (202, bought.json["id"])
            # Also when the door has forgotten the key.
            shop.plain_redis.delete(keys.seen("shop", "known"))
            again = await self.buy(api.url, "known", quantity=2)
            assert (again.status, again.json["id"]) == (202, bought.json["id"])
            other_body = await self.buy(api.url, "known", quantity=1)
            assert_problem(other_body, 422, "idempotency-key-reused")
            assert len(shop.purchases()) == 1

    async def test_a_key_that_postgres_knows_takes_no_units(self, shop: Shop) -> None:
        await shop.item(stock=9)
        async with serving(shop.settings) as api:
            await self.buy(api.url, "known", quantity=2)
            for quantity, status in ((2, 202), (3, 422)):
                shop.plain_redis.delete(keys.seen("shop", "known"))
                assert (await self.buy(api.url, "known", quantity)).status == status
                assert waiting(shop) == 2
                assert shop.plain_redis.exists(keys.seen("shop", "known"))

    async def test_a_value_that_postgres_refuses_takes_no_units(self, shop: Shop) -> None:
        await shop.item(stock=9)
        shop.sql("ALTER TABLE fairlane.purchases ADD CHECK (customer <> 'refused')")
        async with serving(shop.settings) as api:
            assert_problem(await self.buy(api.url, "k", customer="refused"), 500, "internal-error")
            assert waiting(shop) == 0
            assert not shop.plain_redis.exists(keys.seen("shop", "k"))

    async def test_who_finds_no_place_for_the_commit_takes_no_units(self, shop: Shop) -> None:
        await shop.item(stock=9)
        async with serving(shop.with_settings(accept_queue=1, **PATIENT)) as api:
            with shop.holding("LOCK TABLE fairlane.purchases IN SHARE MODE"):
                committing = asyncio.create_task(self.buy(api.url, "k-1"))
                await shop.someone_waits_for_a_lock()
                collected = asyncio.create_task(self.buy(api.url, "k-2"))
                await until(lambda: waiting(shop) == 2)
                assert_problem(await self.buy(api.url, "k-3", quantity=5), 503, "queue-full")
                assert waiting(shop) == 2
                assert not shop.plain_redis.exists(keys.seen("shop", "k-3"))
            assert [answer.status for answer in await asyncio.gather(committing, collected)] == [202, 202]

    async def test_nor_do_twins_of_which_both_find_none(self, shop: Shop) -> None:
        await shop.item(stock=9)
        judge = admission(shop, shop.with_settings(**PATIENT))
        twin = Request("shop", "k-3", "sku-1", 5, "c-1")
        async with serving(shop.with_settings(accept_queue=1, **PATIENT)) as api:
            with shop.holding("LOCK TABLE fairlane.purchases IN SHARE MODE"):
                committing = asyncio.create_task(self.buy(api.url, "k-1"))
                await shop.someone_waits_for_a_lock()
                collected = asyncio.create_task(self.buy(api.url, "k-2"))
                await until(lambda: waiting(shop) == 2)
                # The first of them came to another API process, and is on its way to its commit.
                assert (await judge.admit(twin)).verdict is Verdict.OPEN
                assert_problem(await self.buy(api.url, "k-3", quantity=5), 503, "queue-full")
                assert (waiting(shop), mark(shop, "k-3")[:2]) == (7, "1 ")
                await judge.give_back(twin, forget=True)
                assert (waiting(shop), mark(shop, "k-3")) == (2, "")
            assert [answer.status for answer in await asyncio.gather(committing, collected)] == [202, 202]
        assert waiting(shop) == in_postgres(shop) == 2

    @pytest.mark.parametrize(("quantities", "status"), [((2, 2), 202), ((3, 4), 422)])
    async def test_replays_at_once_of_a_forgotten_key_take_no_units(
        self, shop: Shop, quantities: tuple[int, int], status: int
    ) -> None:
        await shop.item(stock=9)
        async with serving(shop.with_settings(**PATIENT)) as api:
            bought = await self.buy(api.url, "known", quantity=2)
            assert bought.status == 202
            shop.plain_redis.delete(keys.seen("shop", "known"))
            with shop.holding("LOCK TABLE fairlane.purchases IN SHARE MODE"):
                again = [asyncio.create_task(self.buy(api.url, "known", quantities[0]))]
                await until(lambda: mark(shop, "known").startswith("1 "))
                again.append(asyncio.create_task(self.buy(api.url, "known", quantities[1])))
                await until(lambda: mark(shop, "known").startswith("2 "))
                assert waiting(shop) == 2 + quantities[0]
            assert [answer.status for answer in await asyncio.gather(*again)] == [status] * 2
            assert waiting(shop) == in_postgres(shop) == 2
            assert mark(shop, "known") == "known"

    async def test_of_three_with_one_key_the_one_that_is_recorded_takes_units(self, shop: Shop) -> None:
        await shop.item(stock=9)
        settings = shop.with_settings(**PATIENT)
        async with serving(settings) as api:
            with shop.holding("LOCK TABLE fairlane.purchases IN SHARE MODE"):
                three = [asyncio.create_task(self.buy(api.url, "k", 2)) for _ in range(3)]
                await until(lambda: mark(shop, "k").startswith("3 "))
            answers = await asyncio.gather(*three)
            assert [answer.status for answer in answers] == [202] * 3
            assert sorted("Idempotent-Replayed" in answer.headers for answer in answers) == [False, True, True]
            assert len({answer.json["id"] for answer in answers}) == 1
            assert waiting(shop) == in_postgres(shop) == 2
            assert mark(shop, "k").startswith("1 ")
        with shop.decider(settings) as decider:
            decider.drain(shop.purchases()[0]["lane"])
        assert waiting(shop) == in_postgres(shop) == 0

    async def test_who_can_only_get_what_falls_back_is_told_to_come_later(self, shop: Shop) -> None:
        await shop.item(stock=2)
        settings = shop.with_settings(**PATIENT)
        async with serving(settings) as api:
            assert (await self.buy(api.url, "holds", quantity=2)).status == 202
            assert (await self.buy(api.url, "early")).headers["Retry-After"] == "1"
            with shop.decider(settings) as decider:
                decider.drain(shop.purchases()[0]["lane"])
            assert shop.stock() == (0, 2, 0)
            assert (await self.buy(api.url, "waits", quantity=2)).status == 202
            refused = await self.buy(api.url, "late")
            assert_problem(refused, 503, "queue-full")
            assert refused.headers["Retry-After"] == "5"

            # As an older release wrote it.
            assert shop.plain_redis.hdel(keys.item("sku-1"), "available") == 1
            assert (await self.buy(api.url, "late")).headers["Retry-After"] == "1"

    async def test_what_postgres_may_have_recorded_keeps_its_units(self, shop: Shop) -> None:
        await shop.item(stock=9)
        async with serving(shop.with_settings(lock_timeout=0.2)) as api:
            with shop.holding("LOCK TABLE fairlane.purchases IN SHARE MODE"):
                assert_problem(await self.buy(api.url, "k", quantity=2), 503, "unavailable")
            assert waiting(shop) == 2
            assert (await self.buy(api.url, "k", quantity=2)).status == 202
            assert waiting(shop) == 2
