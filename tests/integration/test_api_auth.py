from __future__ import annotations

import pytest

from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call

TERMS = {"name": "Ticket", "stock": 5, "price": 4900, "currency": "EUR"}

#: Every route that needs a key.
ROUTES = [
    ("POST", "/v1/purchases"),
    ("GET", "/v1/purchases/9f86d081884c7d659a2feaa0c55ad015"),
    ("PUT", "/v1/items/auth-1"),
    ("GET", "/v1/items/auth-1"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nobodys-secret"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic shop-secret"},
        {"Authorization": "shop-secret"},
        {"Authorization": "Bearer shop"},
        {"Authorization": "Bearer shop-secret extra"},
        {"Authorization": "Bearer sch\u00f6n"},
    ],
)
async def test_without_a_known_key_nothing_is_answered(
    api: str, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = await call(method, f"{api}{path}", headers, TERMS if method in {"POST", "PUT"} else None)
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    assert "secret" not in answer.text


async def test_a_shop_may_not_change_items(api: str) -> None:
    answer = await call("PUT", f"{api}/v1/items/auth-2", SHOP, TERMS)
    assert_problem(answer, 403, "forbidden")
    assert_problem(await call("GET", f"{api}/v1/items/auth-2", SHOP), 404, "unknown-item")


@pytest.mark.parametrize("value", ["Bearer shop-secret", "bearer shop-secret", "BEARER  shop-secret-2"])
async def test_each_secret_of_a_client_is_its_key(api: str, value: str) -> None:
    await call("PUT", f"{api}/v1/items/auth-3", ADMIN, TERMS)
    assert (await call("GET", f"{api}/v1/items/auth-3", {"Authorization": value})).status == 200
