"""ETag, If-None-Match, Cache-Control: a client asks only for what it has not seen, and is never shown the past."""

from __future__ import annotations

import pytest

from shared import keys
from tests.integration.http_calls import SHOP, call
from tests.integration.serving import serving
from tests.integration.shopfloor import Shop
from tests.integration.test_waiting import queued


@pytest.mark.parametrize(("path", "tag"), [("purchases", '"1-5"'), ("status", 'W/"1-5"')])
async def test_what_the_client_has_is_not_sent_again(shop: Shop, path: str, tag: str) -> None:
    (bought,) = await queued(shop)
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 5)
    async with serving(shop.settings) as api:
        url = f"{api.url}/v1/{path}/{bought.id}"
        shown = await call("GET", url, SHOP)
        assert (shown.status, shown.headers["ETag"]) == (200, tag)
        # Comparison is weak; a list may hold others.
        for match in ('"1-5"', 'W/"1-5"', '"a", "1-5"', '"0-0",W/"1-5" , "b,c"', "*"):
            unchanged = await call("GET", url, SHOP | {"If-None-Match": match})
            assert (unchanged.status, unchanged.text) == (304, ""), match
            for name in ("ETag", "Cache-Control", "Retry-After"):
                assert unchanged.headers[name] == shown.headers[name]
        for other in ('"1-4"', "1-5", '"1-5', '"x1-5"', '"1-5x"', '"*"', ""):
            assert (await call("GET", url, SHOP | {"If-None-Match": other})).status == 200, other


async def test_a_state_that_changes_is_asked_for_again_and_a_final_one_is_kept(shop: Shop) -> None:
    await shop.item("some")
    await shop.item("none", stock=0, waitlist=False)
    changing, final = await shop.hold(shop.order("some"), shop.order("none"))
    async with serving(shop.settings) as api:
        for path in ("purchases", "status"):
            headers = (await call("GET", f"{api.url}/v1/{path}/{changing.id}", SHOP)).headers
            assert (headers["Cache-Control"], headers["Retry-After"]) == ("private, no-cache", "1")
            headers = (await call("GET", f"{api.url}/v1/{path}/{final.id}", SHOP)).headers
            assert headers["Cache-Control"] == "private, max-age=86400, immutable"
            assert "Retry-After" not in headers
        shown = await call("GET", f"{api.url}/v1/purchases/{final.id}", SHOP)
        assert shown.headers["Vary"] == "Authorization"


async def test_a_client_that_has_seen_more_than_redis_is_answered_by_postgres(shop: Shop) -> None:
    (bought,) = await queued(shop)
    # Redis still says queued, and nothing there speaks against it.
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq - 1)
    shop.sql("UPDATE fairlane.purchases SET status = 'waitlisted', rev = 2 WHERE id = %s", bought.id)
    async with serving(shop.settings) as api:
        url = f"{api.url}/v1/purchases/{bought.id}"
        assert (await call("GET", url, SHOP)).json["status"] == "queued"
        assert (await call("GET", url, SHOP | {"If-None-Match": '"x", W/"2-0"'})).status == 304
        # And Redis is mended by that.
        assert (await call("GET", url, SHOP)).json["status"] == "waitlisted"
