"""A client that hangs up is noticed at once, also when it has sent further requests already."""

from __future__ import annotations

import pytest

from tests.integration.api_process import connected
from tests.integration.serving import serving
from tests.integration.shopfloor import Shop, until
from tests.integration.test_waiting import queued

NEXT = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
HELD = [
    ("/v1/status/{id}/events", ""),
    ("/v1/status/{id}", "Prefer: wait=30\r\n"),
]


@pytest.mark.parametrize(("path", "preference"), HELD, ids=["events", "wait"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "later"])
async def test_a_held_request_with_another_behind_it_ends_with_its_client(
    shop: Shop, path: str, preference: str, together: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (bought,) = await queued(shop)
    held = f"GET {path.format(id=bought.id)} HTTP/1.1\r\nHost: x\r\n{preference}\r\n"
    async with serving(shop.settings) as api:
        async with connected(api.url) as connection:
            connection.send(held + NEXT if together else held)
            await until(lambda: api.waiting == 1)
            if not together:
                connection.send(NEXT)
                # The server has read it.
                await until(lambda: api.sent_ahead == 1)
        # Sooner than an event or the end of the wait would have it noticed.
        await until(lambda: api.waiting == 0, bound=10)
        await until(lambda: api.connections == 0)
    assert caplog.messages == []
