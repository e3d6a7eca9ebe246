"""The Python client against a real API process: what it repeats, what it does not, and that it buys once."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count

import aiohttp
import msgspec
import pytest

from ops.buying import Wish, buy_one
from producers.client import Client, RefusedError, UnansweredError
from tests.integration.http_calls import ADMIN, call
from tests.integration.shopfloor import until
from tests.processes.proxy import Proxy

_numbers = count(1)


@pytest.fixture
def wire(api: str) -> Iterator[Proxy]:
    """The way to the API, which can fail."""
    with Proxy.to(api) as proxy:
        yield proxy


@pytest.fixture
async def troubles() -> Counter[str]:
    """What the client had to repeat for."""
    return Counter()


@pytest.fixture
async def client(api: str, wire: Proxy, troubles: Counter[str]) -> AsyncIterator[Client]:
    async with Client(wire.url(api), "shop-secret", on_trouble=lambda what: troubles.update([what])) as opened:
        yield opened


@pytest.fixture
async def sku(api: str) -> str:
    name = f"client-{next(_numbers)}"
    terms = {"name": name, "stock": 10, "price": 500, "currency": "EUR"}
    assert (await call("PUT", f"{api}/v1/items/{name}", ADMIN, terms)).status == 201
    return name


async def test_it_buys_and_sees_the_purchase(client: Client, sku: str) -> None:
    bought = await client.buy(sku, customer="c-1", payment_token="tok_visa", quantity=2, key="client-key-1")
    assert (bought.key, bought.replayed) == ("client-key-1", False)
    assert (bought.purchase.item, bought.purchase.quantity, bought.purchase.amount) == (sku, 2, 1000)
    assert not bought.purchase.final

    again = await client.buy(sku, customer="c-1", payment_token="tok_visa", quantity=2, key="client-key-1")
    assert (again.id, again.replayed) == (bought.id, True)
    assert (await client.get(bought.id)).id == bought.id


async def test_a_lost_answer_is_asked_for_again_with_the_same_key(
    client: Client, sku: str, wire: Proxy, troubles: Counter[str]
) -> None:
    wire.drop_reply(lambda request: request.startswith(b"POST"))
    bought = await client.buy(sku, customer="c-1", payment_token="tok_visa")

    assert wire.dropped == 1
    assert troubles.total() == 1
    # The purchase of the request whose answer was lost.
    assert bought.replayed


async def test_a_service_that_is_away_is_asked_until_it_is_back(
    client: Client, sku: str, wire: Proxy, troubles: Counter[str]
) -> None:
    wire.cut()
    buying = asyncio.create_task(client.buy(sku, customer="c-1", payment_token="tok_visa"))
    await until(lambda: troubles.total() >= 3)
    wire.restore()
    assert not (await buying).replayed


async def test_patience_ends_and_the_key_is_told(api: str, wire: Proxy, sku: str) -> None:
    wire.cut()
    async with Client(wire.url(api), "shop-secret", patience=1.0) as client:
        with pytest.raises(UnansweredError) as unanswered:
            await client.buy(sku, customer="c-1", payment_token="tok_secret")
    assert wire.refused >= 1
    assert unanswered.value.key
    assert "tok_secret" not in str(unanswered.value)


@pytest.mark.parametrize(
    ("order", "status", "slug"),
    [
        ({"item": "no-such-item"}, 404, "unknown-item"),
        ({"quantity": 0}, 400, "malformed"),
        ({"quantity": 11}, 409, "sold-out"),
    ],
)
async def test_a_refusal_is_told_and_not_repeated(
    client: Client, sku: str, troubles: Counter[str], order: dict[str, object], status: int, slug: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        await client.buy(**{"item": sku, "customer": "c-1", "payment_token": "tok_visa", **order})  # type: ignore[arg-type]
    assert (refused.value.status, refused.value.slug) == (status, slug)
    assert refused.value.detail
    assert not troubles


async def test_a_result_that_does_not_come_in_time_is_given_as_it_stands(client: Client, sku: str) -> None:
    bought = await client.buy(sku, customer="c-1", payment_token="tok_visa")
    # No worker runs here.
    assert (await client.result(bought.id, within=0.2)).status == "queued"
    assert (await client.result(bought.id, within=0.2, wait=0)).status == "queued"


async def test_a_cancelled_purchase_is_final(client: Client, sku: str) -> None:
    bought = await client.buy(sku, customer="c-1", payment_token="tok_visa")
    waiting = asyncio.create_task(client.result(bought.id, within=20))
    assert (await client.cancel(bought.id)).status == "cancelled"
    result = await waiting
    assert (result.status, result.final, result.confirmed) == ("cancelled", True, False)


async def test_a_session_that_was_given_stays_open(api: str, sku: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with Client(api, "shop-secret", session=session) as client:
            await client.buy(sku, customer="c-1", payment_token="tok_visa")
        assert not session.closed


async def test_another_key_than_the_clients_is_refused(api: str, sku: str) -> None:
    async with Client(api, "wrong") as client:
        with pytest.raises(RefusedError) as refused:
            await client.buy(sku, customer="c-1", payment_token="tok_visa")
    assert refused.value.status == 401


@asynccontextmanager
async def somebody_in_between(*answers: str) -> AsyncIterator[str]:
    """A proxy that has broken down: it gives these answers to whatever it is asked, one after another, and then the
    last one. "" is none: it hangs up."""
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # Whoever connected has gone without a question.
            writer.close()
            return
        length = re.search(rb"(?i)content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        status, _, body = (left.pop(0) if len(left) > 1 else left[0]).partition(" ")
        if status:
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


UNAUTHORIZED = '401 {"type":"/problems/unauthorized","title":"t","status":401,"detail":"The API key is not known."}'
SOLD_OUT = '409 {"type":"/problems/sold-out","title":"t","status":409,"detail":"There are not 1 of tee left."}'


@pytest.mark.parametrize("answers", [["", UNAUTHORIZED], ["200 <html>"], ["404 <html>"], ["302 "], ['401 {"a":1}']])
async def test_an_answer_that_says_nothing_of_the_purchase_is_no_refusal_and_the_key_is_told(
    answers: list[str],
) -> None:
    async with somebody_in_between(*answers) as url, Client(url, "shop-secret") as client:
        with pytest.raises(UnansweredError) as unanswered:
            await client.buy("tee", customer="c-1", payment_token="tok_visa")
    assert unanswered.value.key


@pytest.mark.parametrize("answers", [[SOLD_OUT], ["", SOLD_OUT], ["408 ", "503 ", SOLD_OUT], [UNAUTHORIZED]])
async def test_a_refusal_has_the_key_too(answers: list[str]) -> None:
    async with somebody_in_between(*answers) as url, Client(url, "shop-secret") as client:
        with pytest.raises(RefusedError) as refused:
            await client.buy("tee", customer="c-1", payment_token="tok_visa", key="my-key")
    assert refused.value.key == "my-key"


async def test_a_result_is_given_as_it_stood_when_the_service_goes_away(client: Client, sku: str) -> None:
    bought = await client.buy(sku, customer="c-1", payment_token="tok_visa")
    shown = msgspec.json.encode(bought.purchase).decode()
    async with somebody_in_between(f"200 {shown}", "") as url, Client(url, "shop-secret") as other:
        assert await other.result(bought.id, within=0.5) == bought.purchase


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://a b"])
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="is not a URL"):
        Client(url, "shop-secret")


async def test_the_command_names_the_key_while_there_may_be_a_purchase(
    client: Client, sku: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bought = await client.buy(sku, customer="c-1", payment_token="tok_visa")
    shown = msgspec.json.encode(bought.purchase).decode()
    wish = Wish("tee", 1, "c-1", "tok_visa")
    async with somebody_in_between(f"202 {shown}", UNAUTHORIZED) as url:
        assert await buy_one(url, "shop-secret", wish, 5) == 2
    assert re.search(r"unauthorized.* --key [0-9a-f]{32}\n$", capsys.readouterr().err)
    async with somebody_in_between("") as url:
        buying = asyncio.create_task(buy_one(url, "shop-secret", wish, 60))
        await asyncio.sleep(0)  # it has begun
        buying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await buying
    assert re.search(r"stopped.* --key [0-9a-f]{32}\n$", capsys.readouterr().err)
    assert await buy_one("nowhere", "shop-secret", wish, 5) == 2
    assert "is not a URL" in capsys.readouterr().err
