"""`/v1/status/{id}`: where a purchase stands, without a key, and for scripts of the shop's own pages."""

from __future__ import annotations

import time

import pytest

from producers import pace as pace_module
from shared import keys
from tests.integration.http_calls import SHOP, assert_problem, call
from tests.integration.serving import Serving, serving
from tests.integration.shopfloor import Shop
from tests.integration.test_waiting import decide, queued, start

ORIGIN = "https://shop.example"
PREFLIGHT = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "prefer"}


async def test_nothing_is_shown_but_where_the_purchase_stands(shop: Shop) -> None:
    (bought,) = await queued(shop)
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 7)
    async with serving(shop.settings) as api:
        shown = await call("GET", f"{api.url}/v1/status/{bought.id}")
        assert shown.status == 200
        assert shown.json == {"status": "queued", "reason": None, "position": 7, "estimated_seconds": None}
        assert shown.headers["Retry-After"] == "1"
        await decide(shop, bought)
        shown = await call("GET", f"{api.url}/v1/status/{bought.id}")
        assert shown.json == {"status": "reserved", "reason": None, "position": None, "estimated_seconds": None}


async def test_the_reason_is_shown(shop: Shop) -> None:
    await shop.item(stock=0, waitlist=False)
    (bought,) = await shop.hold(shop.order())
    async with serving(shop.settings) as api:
        shown = await call("GET", f"{api.url}/v1/status/{bought.id}")
        assert (shown.json["status"], shown.json["reason"]) == ("sold_out", "sold_out")
        assert "Retry-After" not in shown.headers


@pytest.mark.parametrize("purchase_id", ["0" * 32, "x", "0" * 33, "A" * 32, "%00"])
async def test_an_id_that_is_none_is_404(api: str, purchase_id: str) -> None:
    assert_problem(await call("GET", f"{api}/v1/status/{purchase_id}"), 404, "unknown-purchase")


async def test_the_estimate_and_retry_after_follow_the_lanes_pace(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        pace = api.parts.reader.pace
        now = time.monotonic()
        # Ten a second, seen over two seconds until just now.
        for second in (-3, -2, -1, 0):
            pace.observe(bought.lane, bought.seq - 85 + 10 * second, now + second)
        # The reads that follow are no samples, however long they take.
        monkeypatch.setattr(pace_module, "_SAMPLE_AFTER", 60.0)
        monkeypatch.setattr(pace_module, "_FORGET_AFTER", 60.0)

        async def retry_after(path: str, position: int) -> tuple[str, object]:
            shop.plain_redis.set(keys.decided(bought.lane), bought.seq - position)
            shown = await call("GET", f"{api.url}/v1/{path}/{bought.id}", SHOP)
            return shown.headers["Retry-After"], shown.json.get("estimated_seconds")

        assert await retry_after("status", 85) == ("9", 9)
        assert await retry_after("purchases", 85) == ("9", None)
        # No lower watermark is ever shown after a higher one, but it may come late.
        assert await retry_after("status", 2_000) == ("30", 200)

        again = await call("POST", f"{api.url}/v1/purchases", SHOP | {"Idempotency-Key": "one-more"}, {
            "item": "sku-1", "quantity": 1, "customer": "c", "payment_token": "tok",
        })  # fmt: skip
        assert (again.status, again.headers["Retry-After"]) == (202, "9")


async def test_it_can_be_waited_for(shop: Shop) -> None:
    (bought,) = await queued(shop)
    async with serving(shop.settings) as api:
        answer = await start(api, bought, {"Prefer": "wait=30"}, path="status")
        await decide(shop, bought)
        assert (await answer).json["status"] == "reserved"


@pytest.fixture
def with_origins(shop: Shop) -> Shop:
    """The same shop, with a shop page elsewhere."""
    shop.settings = shop.with_settings(cors_origins=(ORIGIN, "http://localhost:5173"))
    return shop


async def readable(
    api: Serving, path: str, origin: str | None = ORIGIN, method: str = "GET", **more: str
) -> str | None:
    """Which origin may read the answer."""
    answer = await call(method, f"{api.url}{path}", more | ({} if origin is None else {"Origin": origin}))
    varies = "Origin" in answer.headers.get("Vary", "")
    assert varies == path.startswith("/v1/status/")
    return answer.headers.get("Access-Control-Allow-Origin")


async def test_scripts_of_configured_origins_may_read_it(with_origins: Shop) -> None:
    (bought,) = await queued(with_origins)
    path = f"/v1/status/{bought.id}"
    async with serving(with_origins.settings) as api:
        shown = await call("GET", f"{api.url}{path}", {"Origin": ORIGIN})
        assert shown.headers["Access-Control-Allow-Origin"] == ORIGIN
        exposed = shown.headers["Access-Control-Expose-Headers"]
        assert {"ETag", "Retry-After"} <= set(exposed.split(", "))
        assert "Access-Control-Allow-Credentials" not in shown.headers
        assert await readable(api, path, "http://localhost:5173") == "http://localhost:5173"
        for stranger in (
            "https://shop.example.evil.example",
            "https://SHOP.example",
            "http://shop.example",
            "null",
            "*",
        ):
            assert await readable(api, path, stranger) is None
        assert await readable(api, path, None) is None
        # Also what is no 200, and the head of a stream.
        assert await readable(api, f"/v1/status/{'0' * 32}") == ORIGIN
        assert await readable(api, path, **{"If-None-Match": shown.headers["ETag"]}) == ORIGIN
        assert await readable(api, f"{path}/events", method="HEAD") == ORIGIN
        # And nothing else of the API.
        assert await readable(api, f"/v1/purchases/{bought.id}", **SHOP) is None
        assert await readable(api, "/healthz") is None


async def test_browsers_that_ask_first_are_told_what_they_may_send(with_origins: Shop) -> None:
    async with serving(with_origins.settings) as api:
        path = f"{api.url}/v1/status/{'0' * 32}"
        allowed = await call("OPTIONS", path, PREFLIGHT | {"Origin": ORIGIN})
        assert (allowed.status, allowed.text) == (204, "")
        assert allowed.headers["Allow"] == "GET, HEAD, OPTIONS"
        assert allowed.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert allowed.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
        assert allowed.headers["Access-Control-Allow-Headers"] == "If-None-Match, Last-Event-ID, Prefer"
        assert allowed.headers["Access-Control-Max-Age"] == "7200"
        stranger = await call("OPTIONS", path, PREFLIGHT | {"Origin": "https://evil.example"})
        assert stranger.status == 204
        assert not [name for name in stranger.headers if name.startswith("Access-Control")]
        other = await call("OPTIONS", f"{api.url}/v1/purchases", PREFLIGHT | {"Origin": ORIGIN})
        assert not [name for name in other.headers if name.startswith("Access-Control")]


async def test_without_configured_origins_nobody_may_read_it(api: str) -> None:
    for method in ("GET", "OPTIONS"):
        answer = await call(method, f"{api}/v1/status/{'0' * 32}", PREFLIGHT | {"Origin": ORIGIN})
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
