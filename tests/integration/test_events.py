"""Server-sent events: a purchase from the queue to its end, for its owner and for a browser."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from producers import events, waiting
from producers.events import EventStream
from producers.reading import Reader
from producers.shown import purchase_json
from producers.waiting import Hub
from shared import keys
from tests.integration.event_streams import Event, open_stream
from tests.integration.http_calls import SHOP, assert_problem, call
from tests.integration.serving import serving
from tests.integration.shopfloor import ScriptedGateway, Shop, until
from tests.integration.test_waiting import decide, queued


async def test_a_purchase_is_told_from_the_queue_to_its_end(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with (
        serving(shop.settings) as api,
        open_stream(f"{api.url}/v1/purchases/{bought.id}/events", SHOP) as stream,
    ):
        assert stream.reply.status == 200
        assert stream.reply.content_type == "text/event-stream"
        assert stream.reply.headers["Cache-Control"] == "no-store"
        assert stream.reply.headers["X-Accel-Buffering"] == "no"
        assert await stream.next() == Event(retry=2_000)
        first = await stream.next_state()
        assert (first.id, first.event, first.data["status"]) == (str(bought.rev), "purchase", "queued")

        await decide(shop, bought)
        reserved = await stream.next_state(after="queued")
        assert (reserved.id, reserved.data["status"]) == ("2", "reserved")

        await shop.charger(ScriptedGateway()).drain()
        rest = await stream.rest()
        assert rest[-1].data == (await call("GET", f"{api.url}/v1/purchases/{bought.id}", SHOP)).json
        assert rest[-1].data["status"] == "confirmed"
        assert int(rest[-1].id or 0) == shop.purchase(bought)["rev"]
        await until(lambda: api.waiting == 0)


@pytest.mark.parametrize(("path", "headers"), [("purchases", SHOP), ("status", {})])
async def test_a_client_that_knows_the_end_is_told_not_to_come_back(
    shop: Shop, path: str, headers: dict[str, str]
) -> None:
    await shop.item(stock=0, waitlist=False)
    (bought,) = await shop.hold(shop.order())
    rev = shop.purchase(bought)["rev"]
    async with serving(shop.settings) as api:
        url = f"{api.url}/v1/{path}/{bought.id}/events"
        known = await call("GET", url, headers | {"Last-Event-ID": str(rev)})
        assert (known.status, known.text) == (204, "")
        for seen in ("1", "nonsense", ""):
            async with open_stream(url, headers | {"Last-Event-ID": seen}) as stream:
                assert [(event.id, event.data["status"]) for event in (await stream.rest())[1:]] == [
                    (str(rev), "sold_out")
                ]


async def test_a_client_that_comes_back_is_not_shown_the_past(shop: Shop) -> None:
    (bought,) = await queued(shop)
    # Redis still says queued, and nothing there speaks against it.
    shop.plain_redis.set(keys.decided(bought.lane), 0)
    shop.sql("UPDATE fairlane.purchases SET status = 'waitlisted', rev = 2 WHERE id = %s", bought.id)
    url = f"/v1/status/{bought.id}/events"
    async with serving(shop.settings) as api, open_stream(f"{api.url}{url}", {"Last-Event-ID": "2"}) as stream:
        assert (await stream.next_state()).data["status"] == "waitlisted"


async def test_the_place_in_the_line_is_told_as_it_moves(shop: Shop) -> None:
    (bought,) = await queued(shop)
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 40)
    async with serving(shop.settings) as api, open_stream(f"{api.url}/v1/status/{bought.id}/events") as stream:
        first = await stream.next_state()
        shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 3)
        second = await stream.next_state()
        assert [(event.id, event.data["position"]) for event in (first, second)] == [("1", 40), ("1", 3)]


async def test_a_silent_stream_says_that_it_is_still_there(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_SAY_AFTER", 0.05)
    (bought,) = await queued(shop)
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 1)
    async with serving(shop.settings) as api, open_stream(f"{api.url}/v1/status/{bought.id}/events") as stream:
        await stream.next_state()
        assert [await stream.next() for _ in range(2)] == [Event(comment="still here")] * 2


async def test_a_stream_ends_one_day_and_can_be_opened_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_LONGEST", 0.05)
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        for _ in range(2):
            async with open_stream(f"{api.url}/v1/status/{bought.id}/events") as stream:
                assert [event.id for event in await stream.rest()] == [None, "1"]


async def test_a_client_that_hangs_up_leaves_nothing_behind(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        for _ in range(3):
            async with open_stream(f"{api.url}/v1/purchases/{bought.id}/events", SHOP) as stream:
                await stream.next_state()
        await until(lambda: api.waiting == 0)
        await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "client-gone"])


async def test_a_flush_of_redis_in_the_middle_loses_no_event(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api, open_stream(f"{api.url}/v1/status/{bought.id}/events") as stream:
        assert (await stream.next_state()).data["status"] == "queued"
        shop.plain_redis.flushall()
        await decide(shop, bought)
        assert (await stream.next_state(after="queued")).data["status"] == "reserved"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_nobody_watches_somebody_elses_purchase(shop: Shop, method: str) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        other = {"Authorization": "Bearer other-secret"}
        assert (await call(method, f"{api.url}/v1/purchases/{bought.id}/events", other)).status == 404
        assert (await call(method, f"{api.url}/v1/purchases/{bought.id}/events")).status == 401
        nobody = await call("GET", f"{api.url}/v1/status/{'0' * 32}/events")
        assert_problem(nobody, 404, "unknown-purchase")


async def test_head_of_a_stream_is_its_headers(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        head = await call("HEAD", f"{api.url}/v1/status/{bought.id}/events")
        assert (head.status, head.text) == (200, "")
        assert head.headers["Content-Type"].startswith("text/event-stream")
        assert api.waiting == 0


async def test_a_slow_reader_skips_what_was_between(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_EVERY", 0.1)
    (bought,) = await queued(shop)
    reader = Reader(shop.engine, shop.redis, shop.settings)
    first = await reader.read(bought.id)
    assert first is not None
    sent: list[bytes] = []
    can_take_more = asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))
        if b"data:" in sent[-1]:
            await can_take_more.wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async with Hub(shop.redis, shop.settings) as hub:
        stream = EventStream(hub, reader, first, "purchase", purchase_json)
        telling = asyncio.create_task(stream({"type": "http", "method": "GET"}, receive, send))
        await until(lambda: len(sent) == 2)
        for position in range(30, 0, -1):
            shop.plain_redis.set(keys.decided(bought.lane), bought.seq - position)
            await reader.read(bought.id)
        await decide(shop, bought)
        can_take_more.set()
        await until(lambda: len(sent) == 3)
        assert b'"reserved"' in sent[2]
        hub.release()
        await telling
        assert sent[3:] == [b""]
