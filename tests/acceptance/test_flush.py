"""Redis wiped in the middle of a sale: nothing there is the only copy, so no outcome changes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from redis import Redis

from shared.routing import lane_of, queue_of
from tests.acceptance.service import Service, eventually
from tests.acceptance.shop import FINAL_WITHIN, Reply, Shop

LANES = 16
STOCK = 240
BUYERS = 360
#: Rounds of questions that are asked while Redis is flushed, and seconds between two flushes: several in each round.
ROUNDS = 40
PAUSE = 0.002
#: Redis is flushed each time this many more purchases were accepted.
FLUSH_EVERY = 30


async def test_flushes_in_mid_sale_change_no_outcome(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=STOCK)
    accepted = 0
    wiped: list[int] = []
    redis = service.redis()

    async def buyer(number: int) -> tuple[str, str]:
        """The purchase's id and how it ended; without an id when it was refused at the door."""
        nonlocal accepted
        token = "tok_declined" if number % 10 == 0 else "tok_visa"
        reply = await shop.buy_insisting(sku, key=f"{sku}-{number}", customer=f"c-{number}", token=token)
        if reply.status == 409:
            assert reply.slug == "sold-out"
            return "", "refused"
        assert reply.status in (200, 202), reply.body
        accepted += 1
        if accepted % FLUSH_EVERY == 0:
            wiped.append(int(redis.dbsize()))
            redis.flushall()
        return reply.body["id"], (await shop.final(reply.body["id"]))["status"]

    try:
        at_once = asyncio.Semaphore(60)

        async def in_turn(number: int) -> tuple[str, str]:
            async with at_once:
                return await buyer(number)

        ends = await asyncio.gather(*(in_turn(number) for number in range(BUYERS)))
    finally:
        redis.close()

    assert sum(keys > 0 for keys in wiped) >= 6, f"flushes that wiped something: {wiped}"

    outcomes = dict(end for end in ends if end[0])
    stored = service.purchases(sku)
    assert {row["id"]: row["status"] for row in stored} == outcomes, "what buyers were told is what Postgres says"
    assert len(stored) == len({row["idempotency_key"] for row in stored})
    counts = Counter(outcomes.values())
    assert set(counts) <= {"confirmed", "declined", "sold_out"}
    assert counts["confirmed"] == STOCK, counts

    item = await shop.item(sku)
    assert (item["available"], item["held"], item["sold"]) == (0, 0, STOCK)
    charged = Counter(charge["reference"] for charge in service.ledger(*outcomes) if charge["status"] == "succeeded")
    assert charged == Counter(row["id"] for row in stored if row["status"] == "confirmed")
    # First come, first served: nobody was sold out who had been accepted before somebody that got a unit.
    last_sold = max(row["seq"] for row in stored if row["status"] == "confirmed")
    first_refused = min((row["seq"] for row in stored if row["status"] == "sold_out"), default=last_sold + 1)
    assert last_sold < first_refused


def published(redis: Redis) -> int:
    """How many messages were ever put into queues."""
    return int(redis.info("commandstats").get("cmdstat_lpush", {}).get("calls", 0))


async def test_a_call_lost_in_a_flush_is_made_again(service: Service, shop: Shop, sku: str) -> None:
    # The lanes' worker already waits for a message, so the next one is its own even while it stands still. The one
    # after that lies in its queue, and is lost.
    first = sku
    second = next(name for n in range(99) if lane_of(name := f"{sku}-{n}", LANES) != lane_of(first, LANES))
    queue = queue_of(lane_of(second, LANES))
    for name in (first, second):
        await shop.put_item(name, stock=1)
    lanes = service.processes["lanes"]
    with service.redis() as redis:
        lanes.pause()
        try:
            before = published(redis)
            ids = [(await shop.buy(first)).body["id"]]
            eventually(lambda: published(redis) > before, FINAL_WITHIN, "a first message")
            ids.append((await shop.buy(second)).body["id"])
            eventually(lambda: redis.llen(queue) == 1, FINAL_WITHIN, f"a message in {queue}")
            redis.flushall()
            assert redis.llen(queue) == 0
        finally:
            lanes.resume()
    assert [(await shop.final(purchase_id))["status"] for purchase_id in ids] == ["confirmed"] * 2


async def test_while_redis_is_flushed_again_and_again_no_answer_is_wrong(
    service: Service, shop: Shop, sku: str
) -> None:
    late, free = f"{sku}-late", f"{sku}-free"
    await shop.put_item(sku, stock=1)
    await shop.put_item(late, stock=1, opens_at="2999-01-01T00:00:00Z")
    await shop.put_item(free, stock=10 * ROUNDS)
    sold = (await shop.buy(sku, key=f"{sku}-sold", customer="c-1")).body["id"]
    await shop.final(sold)
    taken = (await shop.buy(free, key=f"{free}-taken", customer="c-1")).body["id"]
    await shop.final(taken)

    questions: dict[str, tuple[Callable[[], Awaitable[Reply]], Callable[[Reply], bool]]] = {
        "a known key, sold out": (
            lambda: shop.buy(sku, key=f"{sku}-sold", customer="c-1"),
            lambda reply: reply.status == 200 and reply.replayed and reply.body["id"] == sold,
        ),
        "a known key, not sold out": (
            lambda: shop.buy(free, key=f"{free}-taken", customer="c-1"),
            lambda reply: reply.status == 200 and reply.replayed and reply.body["id"] == taken,
        ),
        "a new key, sold out": (lambda: shop.buy(sku), lambda reply: reply.slug == "sold-out"),
        "a new key, not on sale": (lambda: shop.buy(late), lambda reply: reply.slug == "not-on-sale"),
        "a new key, on sale": (lambda: shop.buy(free), lambda reply: reply.status == 202 and not reply.replayed),
        "no such item": (lambda: shop.buy(f"{sku}-none"), lambda reply: reply.slug == "unknown-item"),
        "a purchase": (
            lambda: shop.send("GET", f"/v1/purchases/{sold}"),
            lambda reply: reply.status == 200 and reply.body["status"] == "confirmed",
        ),
        "its public status": (
            lambda: shop.send("GET", f"/v1/status/{sold}"),
            lambda reply: reply.status == 200 and reply.body["status"] == "confirmed",
        ),
        "no such purchase": (
            lambda: shop.send("GET", f"/v1/purchases/{'0' * 32}"),
            lambda reply: reply.slug == "unknown-purchase",
        ),
        "a cancellation that comes too late": (
            lambda: shop.send("DELETE", f"/v1/purchases/{sold}"),
            lambda reply: reply.slug == "too-late",
        ),
    }
    asked: Counter[str] = Counter()
    unavailable: Counter[str] = Counter()

    async def ask(name: str) -> None:
        question, is_right = questions[name]
        reply = await question()
        asked[name] += 1
        if reply.status == 503:
            assert int(reply.headers["Retry-After"]) >= 1
            unavailable[name] += 1
        else:
            assert is_right(reply), (name, reply)

    flushes = 0
    over = False

    def flush() -> None:
        nonlocal flushes
        with service.redis() as redis:
            while not over:
                redis.flushall()
                flushes += 1
                time.sleep(PAUSE)

    flushing = asyncio.create_task(asyncio.to_thread(flush))
    try:
        for _ in range(ROUNDS):
            await asyncio.gather(*(ask(name) for name in questions))
    finally:
        over = True
        await flushing
    assert flushes > ROUNDS
    assert unavailable.total() < asked.total() / 2, f"hardly anything was answered: {unavailable}"

    unavailable.clear()
    await asyncio.gather(*(ask(name) for name in questions))
    assert not unavailable, "all is back by itself"
    eventually(
        lambda: {row["status"] for row in service.purchases(free)} == {"confirmed"}, FINAL_WITHIN, "all are sold"
    )
