"""HEAD and OPTIONS, on every path the API describes."""

from __future__ import annotations

import pytest

from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call
from tests.integration.serving import serving
from tests.integration.shopfloor import Shop
from tests.integration.test_waiting import queued


async def test_options_names_the_methods_of_every_path(api: str) -> None:
    described = (await call("GET", f"{api}/openapi.json")).json["paths"]
    assert len(described) >= 9
    for path, item in described.items():
        answer = await call("OPTIONS", f"{api}{path.replace('{id}', '0' * 32).replace('{sku}', 'x')}")
        assert (answer.status, answer.text) == (204, "")
        expected = {method.upper() for method in item} | {"OPTIONS"} | ({"HEAD"} if "get" in item else set())
        assert set(answer.headers["Allow"].split(", ")) == expected, path
    assert_problem(await call("OPTIONS", f"{api}/nothing"), 404, "not-found")


async def test_head_is_get_without_the_body(shop: Shop) -> None:
    (bought,) = await queued(shop)
    paths = (
        f"/v1/purchases/{bought.id}",
        f"/v1/status/{bought.id}",
        "/v1/items/sku-1",
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/problems/sold-out",
        "/docs",
        "/nothing",
    )
    async with serving(shop.settings) as api:
        for path in paths:
            # Twice the same, whatever the status's age.
            shop.plain_redis.set(f"fairlane:decided:{bought.lane}", bought.seq - 1)
            got = await call("GET", f"{api.url}{path}", ADMIN if "items" in path else SHOP)
            head = await call("HEAD", f"{api.url}{path}", ADMIN if "items" in path else SHOP)
            assert (head.status, head.text) == (got.status, ""), path
            for name in ("Content-Type", "Content-Length", "ETag", "Cache-Control", "Retry-After", "Vary"):
                assert head.headers.get(name) == got.headers.get(name), (path, name)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
async def test_head_needs_the_key_that_get_needs(api: str, headers: dict[str, str]) -> None:
    assert (await call("HEAD", f"{api}/v1/items/x", headers)).status == 401
    assert (await call("HEAD", f"{api}/v1/purchases/{'0' * 32}", headers)).status == 401
    assert (await call("HEAD", f"{api}/v1/purchases", headers)).status == 405
