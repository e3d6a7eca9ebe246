from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import redis
from multidict import CIMultiDict

from shared import keys
from shared.routing import lane_of, queue_of
from shared.settings import Settings
from tests.integration.conftest import RunApi
from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call, fields
from tests.integration.serving import serving
from tests.processes.process import wait_for

TERMS: dict[str, Any] = {"name": "Ticket", "stock": 5, "price": 4900, "currency": "EUR"}


@pytest.fixture
def sku() -> str:
    return f"item-{uuid4().hex[:12]}"


async def test_an_item_is_created_changed_and_shown(api: str, sku: str) -> None:
    created = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS)
    assert (created.status, created.headers["Location"]) == (201, f"/v1/items/{sku}")
    assert created.json == {
        "sku": sku,
        "name": "Ticket",
        "stock": 5,
        "available": 5,
        "held": 0,
        "sold": 0,
        "price": 4900,
        "currency": "EUR",
        "per_customer": None,
        "opens_at": None,
        "closes_at": None,
        "hold_seconds": 900,
        "waitlist": True,
    }
    more = {
        "stock": 7,
        "per_customer": 2,
        "opens_at": "2026-01-31T10:00:00+01:00",
        "hold_seconds": 60,
        "waitlist": False,
    }
    changed = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | more)
    assert changed.status == 200
    assert "Location" not in changed.headers
    shown = await call("GET", f"{api}/v1/items/{sku}", SHOP)
    assert shown.status == 200
    assert shown.json == changed.json
    assert shown.json == created.json | more | {"available": 7, "opens_at": "2026-01-31T09:00:00.000000Z"}


async def test_the_door_learns_of_a_change_at_once(api: str, sku: str, api_environment: dict[str, str]) -> None:
    with redis.Redis.from_url(api_environment["FAIRLANE_REDIS_URL"], decode_responses=True) as client:
        await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS)
        await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | {"stock": 9})
        assert client.hget(keys.item(sku), "rev") == "2"


async def test_a_change_calls_the_lane(api: str, sku: str, api_environment: dict[str, str]) -> None:
    queue = queue_of(lane_of(sku, 16))
    with redis.Redis.from_url(api_environment["FAIRLANE_REDIS_URL"], decode_responses=True) as client:
        await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS)
        # Also the message of another test's item in this lane: one that lies there speaks for all.
        client.delete(queue, keys.called(queue))
        await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | {"stock": 9})
        assert client.exists(keys.called(queue))
        assert client.llen(queue) == 1


async def test_stock_below_what_is_held_or_sold_changes_nothing(
    api: str, sku: str, api_environment: dict[str, str]
) -> None:
    await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS)
    with psycopg.connect(api_environment["FAIRLANE_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "UPDATE fairlane.items SET available = 1, unpaid = 1 WHERE sku = %s", (sku,)
        )  # 1 held, 3 sold
    before = (await call("GET", f"{api}/v1/items/{sku}", SHOP)).json
    assert (before["held"], before["sold"]) == (1, 3)
    refused = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | {"stock": 3, "price": 1})
    assert_problem(refused, 409, "stock-below-committed")
    assert (await call("GET", f"{api}/v1/items/{sku}", SHOP)).json == before
    least = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | {"stock": 4})
    assert (least.status, least.json["available"]) == (200, 0)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"name": "nul\x00"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"name": 5}, "name"),
        ({"stock": -1}, "stock"),
        ({"stock": 1.0}, "stock"),
        ({"stock": 1.5}, "stock"),
        ({"stock": "5"}, "stock"),
        ({"stock": True}, "stock"),
        ({"stock": None}, "stock"),
        ({"stock": 10**30}, "stock"),
        ({"price": -1}, "price"),
        ({"price": 1e300}, "price"),
        ({"currency": "eur"}, "currency"),
        ({"currency": "EURO"}, "currency"),
        ({"currency": "EUR\n"}, "currency"),
        ({"per_customer": 0}, "per_customer"),
        ({"opens_at": "yesterday"}, "opens_at"),
        ({"opens_at": "2026-01-31T09:00:00"}, "opens_at"),
        ({"hold_seconds": 0}, "hold_seconds"),
        ({"hold_seconds": 86_401}, "hold_seconds"),
        ({"waitlist": 1}, "waitlist"),
        ({"available": 5}, "available"),
        ({"opens_at": "2026-01-02T00:00:00Z", "closes_at": "2026-01-01T00:00:00Z"}, "body"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_created(
    api: str, sku: str, wrong: dict[str, Any], field: str
) -> None:
    answer = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | wrong)
    assert_problem(answer, 400, "malformed")
    assert fields(answer) == {field}
    assert_problem(await call("GET", f"{api}/v1/items/{sku}", SHOP), 404, "unknown-item")


# Each is a moment with a zone, and none is one that Postgres gives back as it is.
@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", 1_900_000_000])
async def test_a_moment_that_cannot_be_kept_is_named(api: str, sku: str, moment: object) -> None:
    answer = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, TERMS | {"opens_at": moment})
    assert_problem(answer, 400, "malformed")
    assert fields(answer) == {"opens_at"}


async def test_missing_fields_are_all_named(api: str, sku: str) -> None:
    answer = await call("PUT", f"{api}/v1/items/{sku}", ADMIN, {})
    assert_problem(answer, 400, "malformed")
    assert fields(answer) == {"name", "stock", "price", "currency"}


@pytest.mark.parametrize("method", ["PUT", "GET"])
@pytest.mark.parametrize("path", ["a%00b", "a%20b", "caf%C3%A9", "x" * 65, "sku%0A"])
async def test_a_name_that_no_item_can_have_is_named(api: str, method: str, path: str) -> None:
    answer = await call(method, f"{api}/v1/items/{path}", ADMIN, TERMS if method == "PUT" else None)
    assert_problem(answer, 400, "malformed")
    assert fields(answer) == {"sku"}


@pytest.fixture
async def listed(api: str) -> list[str]:
    """Seven items that follow each other, in byte order: capitals before small letters, and a dash before a dot."""
    stem = f"l-{uuid4().hex[:12]}"
    names = [f"{stem}{end}" for end in ("-1", ".1", "0", "A", "Z", "a", "b")]
    for name in [*names[1::2], *names[::2]]:
        assert (await call("PUT", f"{api}/v1/items/{name}", ADMIN, TERMS)).status == 201
    return names


def before(name: str) -> str:
    """A name that comes before this one, and that no item has: `after` need not be an item's name."""
    return name[:-2]


async def test_items_are_listed_by_name_page_by_page(api: str, listed: list[str]) -> None:
    url, after, seen = f"{api}/v1/items?limit=3", before(listed[0]), list[Any]()
    while len(seen) < len(listed):
        page = await call("GET", f"{url}&after={after}", SHOP)
        assert page.status == 200
        assert len(page.json["items"]) == 3 or page.json["next"] is None
        seen += [item for item in page.json["items"] if item["sku"] in listed]
        if page.json["next"] is None:
            assert "Link" not in page.headers
            break
        after = page.json["next"]
        assert after == page.json["items"][-1]["sku"]
        assert page.headers["Link"] == f'</v1/items?limit=3&after={after}>; rel="next"'
    assert [item["sku"] for item in seen] == listed
    assert seen[2] == (await call("GET", f"{api}/v1/items/{listed[2]}", SHOP)).json


async def test_items_that_are_added_while_somebody_pages_shift_nothing(api: str, listed: list[str]) -> None:
    first = await call("GET", f"{api}/v1/items?limit=2&after={before(listed[0])}", SHOP)
    # Where a page that began at a number of items would show the second once more.
    assert (await call("PUT", f"{api}/v1/items/{listed[0]}-added", ADMIN, TERMS)).status == 201
    (followed,) = [part.split(">")[0].removeprefix("<") for part in [first.headers["Link"]]]
    second = await call("GET", f"{api}{followed}", SHOP)
    assert [item["sku"] for item in first.json["items"] + second.json["items"]] == listed[:4]


async def test_the_last_page_says_so_even_if_it_is_full_or_empty(settings: Settings) -> None:
    async with serving(settings, subscribed=False) as served:
        api = served.url
        empty = await call("GET", f"{api}/v1/items", SHOP)
        assert (empty.status, empty.json) == (200, {"items": [], "next": None})
        for number in range(51):
            assert (await call("PUT", f"{api}/v1/items/i-{number:02d}", ADMIN, TERMS)).status == 201
        usual = await call("GET", f"{api}/v1/items", SHOP)
        assert (len(usual.json["items"]), usual.json["next"]) == (50, "i-49")
        rest = await call("GET", f"{api}/v1/items?after=i-49", SHOP)
        assert ([item["sku"] for item in rest.json["items"]], rest.json["next"]) == (["i-50"], None)
        full = await call("GET", f"{api}/v1/items?limit=51", SHOP)
        assert (len(full.json["items"]), full.json["next"], "Link" in full.headers) == (51, None, False)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1.0", "limit"),
        ("limit=1_0", "limit"),
        (f"limit={'9' * 5000}", "limit"),
        ("after=a%20b", "after"),
        ("after=%00", "after"),
        (f"after={'x' * 65}", "after"),
    ],
)
async def test_a_page_that_cannot_be_is_named(api: str, query: str, field: str) -> None:
    answer = await call("GET", f"{api}/v1/items?{query}", SHOP)
    assert_problem(answer, 400, "malformed")
    assert fields(answer) == {field}


async def test_items_are_listed_to_clients_only(api: str) -> None:
    assert_problem(await call("GET", f"{api}/v1/items"), 401, "unauthorized")


async def test_an_item_that_did_not_change_is_not_sent_again(api: str, sku: str) -> None:
    url = f"{api}/v1/items/{sku}"
    created = await call("PUT", url, ADMIN, TERMS)
    shown = await call("GET", url, SHOP)
    assert shown.headers["ETag"] == created.headers["ETag"]
    for seen in (shown.headers["ETag"], f'"other", W/{shown.headers["ETag"]}', "*"):
        same = await call("GET", url, SHOP | {"If-None-Match": seen})
        assert (same.status, same.text, same.headers["ETag"]) == (304, "", shown.headers["ETag"])
    changed = await call("PUT", url, ADMIN, TERMS | {"price": 1})
    assert changed.headers["ETag"] != created.headers["ETag"]
    again = await call("GET", url, SHOP | {"If-None-Match": shown.headers["ETag"]})
    assert (again.status, again.json["price"], again.headers["ETag"]) == (200, 1, changed.headers["ETag"])


async def test_units_that_are_held_or_sold_change_the_etag(api: str, sku: str, api_environment: dict[str, str]) -> None:
    url = f"{api}/v1/items/{sku}"
    created = await call("PUT", url, ADMIN, TERMS)
    with psycopg.connect(api_environment["FAIRLANE_DATABASE_URL"], autocommit=True) as connection:
        # As the statements do that move stock.
        connection.execute("UPDATE fairlane.items SET available = 4, unpaid = 1, rev = rev + 1 WHERE sku = %s", [sku])
    assert (await call("GET", url, SHOP | {"If-None-Match": created.headers["ETag"]})).status == 200


async def test_a_change_may_be_made_only_to_what_was_seen(api: str, sku: str) -> None:
    url = f"{api}/v1/items/{sku}"
    first = (await call("PUT", url, ADMIN, TERMS)).headers["ETag"]
    second = await call("PUT", url, ADMIN | {"If-Match": f'"0", {first}'}, TERMS | {"price": 2})
    assert (second.status, second.json["price"]) == (200, 2)
    for stale in (first, f"W/{second.headers['ETag']}", second.headers["ETag"].strip('"'), ""):
        refused = await call("PUT", url, ADMIN | {"If-Match": stale}, TERMS | {"price": 3})
        assert_problem(refused, 412, "precondition-failed")
    assert (await call("GET", url, SHOP)).json == second.json
    lines = CIMultiDict([*ADMIN.items(), ("If-Match", '"0"'), ("If-Match", second.headers["ETag"])])
    assert (await call("PUT", url, lines, TERMS | {"price": 5})).json["price"] == 5
    assert (await call("PUT", url, ADMIN | {"If-Match": "*"}, TERMS | {"price": 4})).json["price"] == 4


@pytest.mark.parametrize("tag", ['"1"', "*"])
async def test_a_change_of_what_was_seen_creates_nothing(api: str, sku: str, tag: str) -> None:
    url = f"{api}/v1/items/{sku}"
    assert_problem(await call("PUT", url, ADMIN | {"If-Match": tag}, TERMS), 412, "precondition-failed")
    assert_problem(await call("GET", url, SHOP), 404, "unknown-item")


async def test_of_two_changes_of_what_was_seen_one_is_made(
    run_api: RunApi, environment: dict[str, str], sku: str
) -> None:
    patient = {
        f"FAIRLANE_{name}": "60" for name in ("LOCK_TIMEOUT", "STATEMENT_TIMEOUT", "IDLE_IN_TRANSACTION_TIMEOUT")
    }
    with run_api(environment | patient | {"FAIRLANE_CONNECTION_TIMEOUT": "90"}) as api:
        url = f"{api}/v1/items/{sku}"
        seen = (await call("PUT", url, ADMIN, TERMS)).headers["ETag"]
        database = environment["FAIRLANE_DATABASE_URL"]
        with psycopg.connect(database) as connection, psycopg.connect(database, autocommit=True) as looking:
            # Both stand at the item's lock, each having seen the same.
            connection.execute("SELECT FROM fairlane.items WHERE sku = %s FOR NO KEY UPDATE", [sku])
            changes = [
                asyncio.create_task(call("PUT", url, ADMIN | {"If-Match": seen}, TERMS | {"price": price}))
                for price in (7, 8)
            ]
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )

            def both_wait() -> bool:
                row = looking.execute(waiting).fetchone()
                return row is not None and row[0] >= 2

            assert await asyncio.to_thread(wait_for, both_wait, 20)
            connection.rollback()
            answers = await asyncio.gather(*changes)
    assert sorted(answer.status for answer in answers) == [200, 412]


async def test_an_unknown_item_is_a_problem(api: str, sku: str) -> None:
    assert_problem(await call("GET", f"{api}/v1/items/{sku}", SHOP), 404, "unknown-item")
