from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest
import redis

from shared import keys
from shared.routing import lane_of, queue_of
from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call, fields

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


async def test_an_unknown_item_is_a_problem(api: str, sku: str) -> None:
    assert_problem(await call("GET", f"{api}/v1/items/{sku}", SHOP), 404, "unknown-item")
