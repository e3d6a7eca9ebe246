"""The answers of POST /v1/purchases, one test per row of the table in the API's contract, at a running API process.

Nobody decides here, so what is bought stays queued.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import psycopg
import pytest

from producers.limits import LARGEST_BODY
from tests.integration.conftest import RunApi
from tests.integration.http_calls import ADMIN, SHOP, Answer, assert_problem, call, fields

_numbers = count(1)


@pytest.fixture
async def sku(api: str) -> str:
    return await put_item(api, f"answers-{next(_numbers)}")


async def put_item(api: str, sku: str, **terms: object) -> str:
    body = {"name": "Tee", "stock": 2, "price": 100, "currency": "EUR"} | terms
    assert (await call("PUT", f"{api}/v1/items/{sku}", ADMIN, body)).status in (200, 201)
    return sku


async def buy(api: str, sku: str, key: str = "k", headers: Mapping[str, str] = SHOP, **order: object) -> Answer:
    """A request whose key is of this item alone."""
    body = {"item": sku, "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"} | order
    return await call("POST", f"{api}/v1/purchases", {**headers, "Idempotency-Key": f"{sku}-{key}"}, body)


async def test_202_accepted(api: str, sku: str) -> None:
    answer = await buy(api, sku, quantity=2)
    assert answer.status == 202
    assert answer.headers["Location"] == f"/v1/purchases/{answer.json['id']}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert "Idempotent-Replayed" not in answer.headers
    assert (answer.json["status"], answer.json["amount"], answer.json["quantity"]) == ("queued", 200, 2)


async def test_202_again_is_the_same_purchase(api: str, sku: str) -> None:
    first, again = await buy(api, sku), await buy(api, sku)
    assert (again.status, again.headers["Idempotent-Replayed"]) == (202, "true")
    assert (again.json["id"], again.headers["Location"]) == (first.json["id"], first.headers["Location"])
    assert int(again.headers["Retry-After"]) >= 1


async def test_200_once_final(api: str, sku: str) -> None:
    first = await buy(api, sku)
    assert (await call("DELETE", f"{api}{first.headers['Location']}", SHOP)).status == 200
    again = await buy(api, sku)
    assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert (again.json["id"], again.json["status"]) == (first.json["id"], "cancelled")
    assert again.headers["Location"] == first.headers["Location"]
    assert "Retry-After" not in again.headers


async def test_400_idempotency_key_missing(api: str, sku: str) -> None:
    body = {"item": sku, "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}
    for key in ({}, {"Idempotency-Key": ""}, {"Idempotency-Key": "k" * 256}, {"Idempotency-Key": "a b"}):
        assert_problem(await call("POST", f"{api}/v1/purchases", SHOP | key, body), 400, "idempotency-key-missing")


async def test_400_malformed(api: str, sku: str) -> None:
    bad: dict[str, Any] = {"quantity": "1", "item": "a/b", "customer": "", "payment_token": 7, "color": "red"}
    for field, wrong in bad.items():
        answer = await buy(api, sku, **{field: wrong})
        assert_problem(answer, 400, "malformed")
        assert fields(answer) == {field}
    headers = SHOP | {"Idempotency-Key": "k", "Content-Type": "application/json"}
    assert_problem(await call("POST", f"{api}/v1/purchases", headers, data=b"{"), 400, "malformed")


async def test_401_unauthorized(api: str, sku: str) -> None:
    for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Basic shop-secret"}):
        answer = await buy(api, sku, headers=headers)
        assert_problem(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


async def test_403_forbidden(api: str, sku: str) -> None:
    terms = {"name": "Tee", "stock": 2, "price": 100, "currency": "EUR"}
    assert_problem(await call("PUT", f"{api}/v1/items/{sku}", SHOP, terms), 403, "forbidden")


async def test_404_unknown_item(api: str, sku: str) -> None:
    assert_problem(await buy(api, f"{sku}-none"), 404, "unknown-item")


async def test_409_sold_out_records_nothing(api: str, sku: str) -> None:
    assert_problem(await buy(api, sku, quantity=3), 409, "sold-out")
    await put_item(api, sku, stock=3)
    assert (await buy(api, sku, quantity=3)).status == 202


async def test_409_not_on_sale_records_nothing(api: str, sku: str) -> None:
    await put_item(api, sku, opens_at="2999-01-01T00:00:00Z")
    assert_problem(await buy(api, sku), 409, "not-on-sale")
    await put_item(api, sku, opens_at=None, closes_at="2000-01-01T00:00:00Z")
    assert_problem(await buy(api, sku), 409, "not-on-sale")
    await put_item(api, sku)
    assert (await buy(api, sku)).status == 202


async def test_413_too_large(api: str, sku: str) -> None:
    assert_problem(await buy(api, sku, customer="c" * LARGEST_BODY), 413, "too-large")


async def test_415_not_json(api: str, sku: str) -> None:
    headers = SHOP | {"Idempotency-Key": f"{sku}-k", "Content-Type": "text/plain"}
    assert_problem(await call("POST", f"{api}/v1/purchases", headers, data=b"{}"), 415, "not-json")


async def test_422_idempotency_key_reused(api: str, sku: str) -> None:
    assert (await buy(api, sku)).status == 202
    assert_problem(await buy(api, sku, quantity=2), 422, "idempotency-key-reused")


async def test_429_rate_limited(run_api: RunApi, environment: dict[str, str]) -> None:
    with run_api(environment | {"FAIRLANE_CLIENT_RATE": "0.1", "FAIRLANE_CLIENT_BURST": "1"}) as api:
        sku = await put_item(api, "limited")
        assert (await buy(api, sku)).status == 202
        refused = await buy(api, sku, "another")
        assert_problem(refused, 429, "rate-limited")
        assert 1 <= int(refused.headers["Retry-After"]) <= 10
        assert (await buy(api, sku)).status == 202, "a key that is known is never refused"


async def test_503_queue_full(api: str, sku: str) -> None:
    assert (await buy(api, sku, quantity=2)).status == 202
    refused = await buy(api, sku, "another")
    assert_problem(refused, 503, "queue-full")
    assert int(refused.headers["Retry-After"]) >= 1


async def test_503_unavailable(api: str, api_environment: dict[str, str], sku: str) -> None:
    with psycopg.connect(api_environment["FAIRLANE_DATABASE_URL"]) as connection:
        connection.execute("LOCK TABLE fairlane.purchases IN SHARE MODE")
        refused = await buy(api, sku)
    assert_problem(refused, 503, "unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert (await buy(api, sku)).status == 202
