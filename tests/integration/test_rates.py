"""Rate limits on a real Redis: buckets of clients, customers and everybody, and how a client is told of them."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from producers.admit import Admission, Request, Ruling, Verdict
from shared import keys
from tests.integration.http_calls import SHOP, Answer, assert_problem, call
from tests.integration.serving import serving
from tests.integration.shopfloor import BOUND, Shop, knock

#: Requests a second, so few that no token comes back during a test.
SELDOM = 0.001


def admission(shop: Shop, **limits: Any) -> Admission:
    return Admission(shop.engine, shop.redis, shop.with_settings(**limits))


async def ask(
    judge: Admission, key: str, item: str = "sku-1", *, quantity: int = 1, client: str = "shop", customer: str = "c-1"
) -> Ruling:
    return await judge.admit(Request(client, key, item, quantity, customer))


def left(ruling: Ruling) -> list[int]:
    return [allowance.left for allowance in ruling.allowances]


class TestBuckets:
    async def test_off_until_set(self, shop: Shop) -> None:
        await shop.item(stock=1_000)
        judge = admission(shop)
        verdicts = await asyncio.gather(*(knock(judge, f"k-{n}") for n in range(1_000)))

        assert set(verdicts) == {Verdict.OPEN}
        assert (judge.limits, judge.policy) == ((), None)
        assert shop.plain_redis.keys(f"{keys.PREFIX}rate:*") == []

    async def test_a_client_may_send_its_burst_and_no_more(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=SELDOM, client_burst=3)
        rulings = [await ask(judge, f"k-{n}", customer=f"c-{n}") for n in range(4)]

        assert [ruling.verdict for ruling in rulings] == [*[Verdict.OPEN] * 3, Verdict.CLIENT_RATE]
        assert [left(ruling) for ruling in rulings] == [[2], [1], [0], [0]]
        assert 990 < rulings[3].wait <= 1_000
        assert await knock(judge, "k-1", client="other") is Verdict.OPEN
        # Who is refused by a limit takes nothing and is not known.
        assert shop.plain_redis.get(keys.waiting("sku-1")) == "4"
        assert not shop.plain_redis.exists(keys.seen("shop", "k-3"))

    async def test_also_within_one_group_and_at_all_processes(self, shop: Shop) -> None:
        await shop.item(stock=100)
        doors = [admission(shop, client_rate=SELDOM, client_burst=10) for _ in range(2)]
        verdicts = await asyncio.gather(*(knock(doors[n % 2], f"k-{n}") for n in range(50)))

        assert verdicts.count(Verdict.OPEN) == 10
        assert verdicts.count(Verdict.CLIENT_RATE) == 40

    async def test_each_customer_of_each_client_has_a_bucket(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, customer_rate=SELDOM, customer_burst=1)
        asked = [("shop", "c-1"), ("shop", "c-1"), ("shop", "c-2"), ("other", "c-1"), ("other", "c-1")]
        verdicts = [await knock(judge, f"k-{n}", client=a, customer=b) for n, (a, b) in enumerate(asked)]

        opened, refused = Verdict.OPEN, Verdict.CUSTOMER_RATE
        assert verdicts == [opened, refused, opened, opened, refused]

    async def test_who_is_refused_by_one_limit_takes_no_token_of_the_others(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(
            shop,
            client_rate=SELDOM,
            client_burst=9,
            customer_rate=SELDOM,
            customer_burst=1,
            total_rate=SELDOM,
            total_burst=2,
        )
        assert left(await ask(judge, "k-1", customer="c-1")) == [8, 0, 1]
        assert left(await ask(judge, "k-2", customer="c-1")) == [8, 0, 1]
        assert left(await ask(judge, "k-3", customer="c-2")) == [7, 0, 0]
        by_total = await ask(judge, "k-4", customer="c-3")
        assert (by_total.verdict, left(by_total)) == (Verdict.TOTAL_RATE, [7, 1, 0])
        by_both = await ask(judge, "k-5", customer="c-1")
        assert by_both.verdict is Verdict.CUSTOMER_RATE, "what the client can do something about is said first"

    async def test_who_is_refused_afterwards_has_used_its_tokens(self, shop: Shop) -> None:
        """A flood of requests that get nothing is a flood, too."""
        await shop.item(stock=3)
        await shop.item("gone", stock=0)
        await shop.item("closed", closes_at=datetime.now(UTC) - timedelta(hours=1))
        judge = admission(shop, client_rate=SELDOM, client_burst=6, total_rate=SELDOM, total_burst=9)
        wanted = [("no-such-item", 1), ("gone", 1), ("closed", 1), ("sku-1", 2), ("sku-1", 2), ("sku-1", 4)]
        rulings = [await ask(judge, f"k-{n}", item, quantity=units) for n, (item, units) in enumerate(wanted)]

        assert [ruling.verdict for ruling in rulings] == [
            Verdict.UNKNOWN_ITEM,
            Verdict.SOLD_OUT,
            Verdict.NOT_ON_SALE,
            Verdict.OPEN,
            Verdict.QUEUE_FULL,
            Verdict.SOLD_OUT,
        ]
        assert [left(ruling) for ruling in rulings] == [[5, 8], [4, 7], [3, 6], [2, 5], [1, 4], [0, 3]]
        assert await knock(judge, "k-6", "no-such-item") is Verdict.CLIENT_RATE, "before its item is judged"

    async def test_who_knocks_again_once_what_was_missing_is_there_takes_one_token(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=SELDOM, client_burst=3)
        assert left(await ask(judge, "k-1")) == [2], "neither its item nor its count was there"
        shop.plain_redis.delete(keys.waiting("sku-1"))
        assert left(await ask(judge, "k-2")) == [1]
        shop.plain_redis.delete(keys.item("sku-1"))
        last = await ask(judge, "k-3")
        assert (last.verdict, left(last)) == (Verdict.OPEN, [0])

    async def test_a_known_key_takes_no_token_and_is_never_refused(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=SELDOM, client_burst=2, total_rate=SELDOM, total_burst=2)
        first, *again = [await ask(judge, "k") for _ in range(5)]
        assert (first.verdict, left(first)) == (Verdict.OPEN, [1, 1])
        assert {ruling.verdict for ruling in again} == {Verdict.KNOWN}
        assert [left(ruling) for ruling in again] == [[1, 1]] * 4

        assert [await knock(judge, key) for key in ("new", "newer")] == [Verdict.OPEN, Verdict.CLIENT_RATE]
        assert await knock(judge, "k") is Verdict.KNOWN

    async def test_tokens_come_back(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=20, client_burst=1)
        assert await knock(judge, "k-0") is Verdict.OPEN
        asked, deadline = 1, time.monotonic() + BOUND
        # Asking in vain takes nothing, so it does not delay the next token either.
        while await knock(judge, f"k-{asked}") is not Verdict.OPEN:
            asked += 1
            assert time.monotonic() < deadline, "no token came back"

    async def test_buckets_expire_once_they_are_full(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=0.001, client_burst=5, customer_rate=0.002, customer_burst=5)
        await ask(judge, "k-1")
        ruling = await ask(judge, "k-2")
        buckets = keys.client_rate("shop"), keys.customer_rate("shop", "c-1")
        lives = [shop.plain_redis.pttl(bucket) / 1000 for bucket in buckets]

        assert 1_900 < lives[0] <= 2_000
        assert 900 < lives[1] <= 1_000
        assert [round(allowance.full_in, -2) for allowance in ruling.allowances] == [2_000, 1_000]

    async def test_a_clock_that_was_set_back_closes_no_bucket_for_longer_than_an_empty_one(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=0.1, client_burst=2)
        in_a_day = int((time.time() + 86_400) * 1_000_000)
        shop.plain_redis.set(keys.client_rate("shop"), in_a_day)
        ruling = await ask(judge, "k")

        assert (ruling.verdict, left(ruling)) == (Verdict.CLIENT_RATE, [0])
        assert ruling.wait <= 10

    async def test_after_a_flush_all_buckets_are_full(self, shop: Shop) -> None:
        await shop.item(stock=100)
        judge = admission(shop, client_rate=SELDOM, client_burst=1)
        assert [await knock(judge, key) for key in ("k-1", "k-2")] == [Verdict.OPEN, Verdict.CLIENT_RATE]
        shop.plain_redis.flushall()
        assert [await knock(judge, key) for key in ("k-3", "k-4")] == [Verdict.OPEN, Verdict.CLIENT_RATE]

    async def test_a_burst_is_what_comes_in_a_second_unless_it_is_set(self, shop: Shop) -> None:
        limits = admission(shop, client_rate=2.5, customer_rate=SELDOM, total_rate=100, total_burst=7).limits
        assert [(limit.rate, limit.burst) for limit in limits] == [(2.5, 3), (SELDOM, 1), (100, 7)]


class TestOverHttp:
    async def buy(self, url: str, key: str, customer: str = "c-1", **order: Any) -> Answer:
        body = {"item": "sku-1", "quantity": 1, "customer": customer, "payment_token": "tok_visa", **order}
        return await call("POST", f"{url}/v1/purchases", SHOP | {"Idempotency-Key": key}, body)

    async def test_without_limits_nothing_is_said_of_them(self, shop: Shop) -> None:
        await shop.item()
        async with serving(shop.settings) as api:
            bought = await self.buy(api.url, "k-1")
            assert bought.status == 202
            assert not {"RateLimit", "RateLimit-Policy"} & set(bought.headers)

    async def test_every_answer_says_what_is_allowed_and_what_is_left(self, shop: Shop) -> None:
        await shop.item(stock=3)
        limits = {"client_rate": SELDOM, "client_burst": 9, "customer_rate": SELDOM, "customer_burst": 1}
        policy = '"client";q=9;w=9000, "customer";q=1;w=1000'
        async with serving(shop.with_settings(**limits, total_rate=500)) as api:
            said: list[tuple[int, int, int]] = []

            async def say(key: str, **order: Any) -> Answer:
                answer = await self.buy(api.url, key, **order)
                assert answer.headers["RateLimit-Policy"] == policy
                found = re.fullmatch(
                    r'"client";r=(\d+);t=(\d+), "customer";r=(\d+);t=(\d+)', answer.headers["RateLimit"]
                )
                assert found, answer.headers["RateLimit"]
                client, client_full_in, customer, customer_full_in = map(int, found.groups())
                missing = 9 - client
                assert 1_000 * (missing - 1) < client_full_in <= 1_000 * missing
                assert 0 < customer_full_in <= 1_000
                said.append((answer.status, client, customer))
                return answer

            await say("k-1")
            refused = await say("k-2")
            assert_problem(refused, 429, "rate-limited")
            assert 900 < int(refused.headers["Retry-After"]) <= 1_000
            await say("k-1")
            await say("k-1", quantity=2)
            await say("k-3", customer="c-3", item="no-such-item")
            await say("k-4", customer="c-4", quantity=4)
            await say("k-5", customer="c-5", quantity=3)
            accepted = [(202, 8, 0), (429, 8, 0), (202, 8, 0), (422, 8, 0)]
            assert said == [*accepted, (404, 7, 0), (409, 6, 0), (503, 5, 0)]

            malformed = await self.buy(api.url, "k-6", quantity=0)
            assert malformed.status == 400
            assert malformed.headers["RateLimit-Policy"] == policy
            assert "RateLimit" not in malformed.headers, "the door was not asked"

    async def test_what_all_together_may_send_is_503_and_not_shown(self, shop: Shop) -> None:
        await shop.item()
        async with serving(shop.with_settings(total_rate=SELDOM, total_burst=1)) as api:
            assert (await self.buy(api.url, "k-1")).status == 202
            refused = await self.buy(api.url, "k-2")
            assert_problem(refused, 503, "queue-full")
            assert 900 < int(refused.headers["Retry-After"]) <= 1_000
            assert not {"RateLimit", "RateLimit-Policy"} & set(refused.headers)
            assert (await self.buy(api.url, "k-1")).status == 202

    async def test_a_retry_is_not_refused_also_when_the_door_has_forgotten_its_key(self, shop: Shop) -> None:
        await shop.item()
        async with serving(shop.with_settings(client_rate=SELDOM, client_burst=1)) as api:
            bought = await self.buy(api.url, "k-1")
            shop.plain_redis.delete(keys.seen("shop", "k-1"))
            again = await self.buy(api.url, "k-1")
            assert (again.status, again.json["id"]) == (202, bought.json["id"])
            assert again.headers["Idempotent-Replayed"] == "true"
            assert (await self.buy(api.url, "k-2")).status == 429
