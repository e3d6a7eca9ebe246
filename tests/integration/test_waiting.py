"""`Prefer: wait=N`: who waits for a purchase to change is told at once, by one subscription for all."""

from __future__ import annotations

import asyncio

import pytest
import redis.asyncio

from producers import waiting
from shared import keys, statuses
from shared.purchases import PurchaseRecord
from tests.integration.event_streams import open_stream
from tests.integration.http_calls import SHOP, Answer, assert_problem, call
from tests.integration.serving import Serving, serving
from tests.integration.shopfloor import NOBODY_LISTENS, Shop, until
from tests.integration.test_statuses import record, write

WAIT = SHOP | {"Prefer": "wait=30"}


@pytest.fixture
def _told_by_messages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits does not look by itself, so only a message wakes it."""
    monkeypatch.setattr(waiting, "LOOK_EVERY", 3_600)


async def queued(shop: Shop, purchases: int = 1) -> list[PurchaseRecord]:
    await shop.item(stock=1_000)
    return await shop.buy(*(shop.order() for _ in range(purchases)))


async def decide(shop: Shop, bought: PurchaseRecord) -> None:
    with shop.decider() as decider:
        await asyncio.to_thread(decider.drain, bought.lane)


def change_unheard(shop: Shop, bought: PurchaseRecord) -> None:
    """A change of which Redis is told nothing, and which makes it forget what it knew."""
    shop.sql("UPDATE fairlane.purchases SET status = 'waitlisted', rev = rev + 1 WHERE id = %s", bought.id)
    shop.plain_redis.delete(keys.purchase(bought.id))


async def start(
    api: Serving, bought: PurchaseRecord, headers: dict[str, str] | None = None, path: str = "purchases"
) -> asyncio.Task[Answer]:
    """A request that has begun to wait."""
    before = api.waiting
    task = asyncio.create_task(call("GET", f"{api.url}/v1/{path}/{bought.id}", headers or WAIT))
    await until(lambda: api.waiting == before + 1)
    return task


@pytest.mark.usefixtures("_told_by_messages_only")
async def test_a_change_is_told_at_once(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        answer = await start(api, bought)
        await decide(shop, bought)
        told = await answer
        assert (told.status, told.json["status"]) == (200, "reserved")
        assert told.headers["Preference-Applied"] == "wait=30"
        assert api.waiting == 0


@pytest.mark.usefixtures("_told_by_messages_only")
async def test_fifty_who_wait_are_all_told_by_one_subscription(shop: Shop) -> None:
    bought = await queued(shop, 50)
    ((_, before),) = await shop.redis.pubsub_numsub(keys.CHANGED)
    async with serving(shop.settings) as api:
        answers = [asyncio.create_task(call("GET", f"{api.url}/v1/purchases/{one.id}", WAIT)) for one in bought]
        await until(lambda: api.waiting == 50)
        ((_, meanwhile),) = await shop.redis.pubsub_numsub(keys.CHANGED)
        assert meanwhile == before + 1
        await decide(shop, bought[0])
        told = await asyncio.gather(*answers)
        assert [answer.json["id"] for answer in told] == [one.id for one in bought]
        assert {answer.json["status"] for answer in told} == {"reserved"}
        assert api.waiting == 0


async def test_a_change_of_which_no_message_came_is_seen_by_looking(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        answer = await start(api, bought)
        change_unheard(shop, bought)
        assert (await answer).json["status"] == "waitlisted"


@pytest.mark.usefixtures("_told_by_messages_only")
async def test_a_subscription_that_broke_comes_back_and_what_was_missed_is_looked_up(shop: Shop) -> None:
    missed, later = await queued(shop, 2)
    async with serving(shop.settings) as api:
        first = await start(api, missed)
        second = await start(api, later)
        change_unheard(shop, missed)
        await shop.redis.client_kill_filter(_type="pubsub")
        assert (await first).json["status"] == "waitlisted"
        await decide(shop, later)
        assert (await second).json["status"] == "reserved"


async def test_redis_that_comes_only_later_is_subscribed_to(shop: Shop, unused_tcp_port: int) -> None:
    settings = shop.with_settings(redis_url=f"redis://127.0.0.1:{unused_tcp_port}/0")
    (bought,) = await queued(shop)
    async with serving(settings, subscribed=False) as api:
        # Without Redis, looking must do, and Postgres answers.
        answer = await start(api, bought)
        await decide(shop, bought)
        assert (await answer).json["status"] == "reserved"
        target = shop.plain_redis.connection_pool.connection_kwargs

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(target["host"], target["port"])
            await asyncio.gather(_copy(reader, back), _copy(there, writer))

        async with await asyncio.start_server(forward, "127.0.0.1", unused_tcp_port):
            await until(api.parts.hub.subscribed.is_set)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65_536):
        sink.write(data)
    sink.close()


async def test_a_subscription_that_hangs_is_noticed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_TEST_AFTER", 0.05)
    async with serving(shop.with_settings(redis_timeout=0.2)) as api:
        await shop.redis.client_pause(1_000)
        await until(lambda: not api.parts.hub.subscribed.is_set())
        await until(api.parts.hub.subscribed.is_set)


async def test_when_the_time_is_up_the_purchase_is_shown_as_it_is(shop: Shop) -> None:
    (bought,) = await queued(shop)
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 1)
    async with serving(shop.settings) as api:
        path = f"{api.url}/v1/purchases/{bought.id}"
        shown = await call("GET", path, SHOP | {"Prefer": "wait=1"})
        assert (shown.status, shown.json["status"]) == (200, "queued")
        assert (shown.headers["Preference-Applied"], shown.headers["Retry-After"]) == ("wait=1", "1")
        unchanged = await call("GET", path, SHOP | {"Prefer": "wait=1", "If-None-Match": shown.headers["ETag"]})
        assert (unchanged.status, unchanged.text) == (304, "")
        assert unchanged.headers["Preference-Applied"] == "wait=1"


async def test_what_is_final_or_another_than_the_client_has_seen_is_shown_without_waiting(shop: Shop) -> None:
    await shop.item("none", stock=0, waitlist=False)
    await shop.item("some", stock=1)
    sold_out, reserved = await shop.hold(shop.order("none"), shop.order("some"))
    async with serving(shop.settings) as api:
        final = await call("GET", f"{api.url}/v1/purchases/{sold_out.id}", WAIT)
        assert final.json["status"] == "sold_out"
        moved = await call("GET", f"{api.url}/v1/purchases/{reserved.id}", WAIT | {"If-None-Match": '"1-7"'})
        assert moved.json["status"] == "reserved"


async def test_a_client_that_knows_the_state_waits_for_the_next(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        # The place in the line that it has seen is another: that alone is no news.
        answer = await start(api, bought, WAIT | {"If-None-Match": f'"{bought.rev}-99"'})
        await decide(shop, bought)
        assert (await answer).json["status"] == "reserved"


async def test_a_client_that_hangs_up_leaves_nothing_behind(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        answers = [await start(api, bought) for _ in range(3)]
        for answer in answers:
            answer.cancel()
        await until(lambda: api.waiting == 0)
        await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "client-gone"])


@pytest.mark.usefixtures("_told_by_messages_only")
async def test_when_the_process_is_told_to_stop_everybody_is_answered(shop: Shop) -> None:
    bought = await queued(shop, 20)
    async with serving(shop.settings) as api:
        answers = [asyncio.create_task(call("GET", f"{api.url}/v1/purchases/{one.id}", WAIT)) for one in bought]
        async with open_stream(f"{api.url}/v1/status/{bought[0].id}/events") as stream:
            await stream.next_state()
            await until(lambda: api.waiting == 21)
            await api.stop()
            # Beyond its grace period the server would have broken them off.
            assert await stream.rest() == []
        assert [(answer.status, answer.json["status"]) for answer in await asyncio.gather(*answers)] == [
            (200, "queued")
        ] * 20


async def test_without_redis_and_postgres_a_wait_ends_with_503(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.with_settings(redis_url=NOBODY_LISTENS), subscribed=False) as api:
        answer = await start(api, bought, SHOP | {"Prefer": "wait=2"})
        # In a thread, as it waits for the reads under way.
        await asyncio.to_thread(shop.sql, "ALTER TABLE fairlane.purchases RENAME TO out_of_reach")
        assert_problem(await answer, 503, "unavailable")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_somebody_elses_purchase_is_not_waited_for(shop: Shop, method: str) -> None:
    (bought,) = await queued(shop)
    other = {"Authorization": "Bearer other-secret", "Prefer": "wait=30"}
    async with serving(shop.settings) as api:
        assert (await call(method, f"{api.url}/v1/purchases/{bought.id}", other)).status == 404


async def heard(shop: Shop, listener: redis.asyncio.client.PubSub) -> list[str]:
    """The ids that were published until now, message by message."""
    await shop.redis.publish(keys.CHANGED, "end")
    found: list[str] = []
    while "end" not in found:
        message = await listener.get_message(timeout=20)
        assert message is not None
        if message["type"] == "message":
            found.append(message["data"])
    return found[:-1]


async def test_only_what_is_newer_than_what_was_known_is_announced_in_one_message(shop: Shop) -> None:
    async with shop.redis.pubsub() as listener:
        await listener.subscribe(keys.CHANGED)
        await write(shop, [record(rev=2), record(id="b" * 32, rev=1)])
        assert await heard(shop, listener) == [f"{'a' * 32} {'b' * 32}"]
        await write(shop, [record(rev=2), record(id="b" * 32, rev=2), record(id="c" * 32, rev=1)])
        assert await heard(shop, listener) == [f"{'b' * 32} {'c' * 32}"]
        await write(shop, [record(rev=1), record(id="b" * 32, rev=2)])
        assert await heard(shop, listener) == []
        async with shop.redis.pipeline(transaction=False) as pipe:
            statuses.queue_write(pipe, [], shop.settings)
            assert await pipe.execute() == []
