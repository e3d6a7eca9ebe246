from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from producers.problems import CATALOGUE
from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call, fields

JSON = {"Content-Type": "application/json"}
ITEM = b'{"name": "Ticket", "stock": 5, "price": 4900, "currency": "EUR"}'


@pytest.mark.parametrize("slug", CATALOGUE)
async def test_the_type_of_every_problem_is_a_page(api: str, slug: str) -> None:
    page = await call("GET", f"{api}/problems/{slug}")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert f"<h1>{CATALOGUE[slug].title}</h1>" in page.text
    assert f"HTTP {CATALOGUE[slug].status}" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "<script" not in page.text


async def test_the_list_links_every_page(api: str) -> None:
    listing = await call("GET", f"{api}/problems")
    assert listing.status == 200
    assert all(f'href="/problems/{slug}"' in listing.text for slug in CATALOGUE)


async def test_pages_escape_what_they_say(api: str) -> None:
    assert "Bearer &lt;key&gt;" in (await call("GET", f"{api}/problems/unauthorized")).text


@pytest.mark.parametrize("path", ["/", "/nothing", "/problems/none", "/v1/items/x/", "/redoc", "/docs/none", "/v1"])
async def test_an_unknown_path_is_a_problem(api: str, path: str) -> None:
    assert_problem(await call("GET", f"{api}{path}", ADMIN), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/items/x", {"GET", "HEAD", "OPTIONS", "PUT"}),
        ("GET", "/v1/purchases", {"OPTIONS", "POST"}),
        ("HEAD", "/v1/purchases", {"OPTIONS", "POST"}),
        ("POST", "/healthz", {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", "/problems", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_a_wrong_method_is_told_all_right_ones(api: str, method: str, path: str, allowed: set[str]) -> None:
    answer = await call(method, f"{api}{path}", ADMIN)
    if method == "HEAD":
        assert answer.status == 405
    else:
        assert_problem(answer, 405, "method-not-allowed")
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert (await call("OPTIONS", f"{api}{path}")).headers["Allow"] == answer.headers["Allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b'{"name": "Ticket",}',
        b"[]",
        b"5",
        b"null",
        b'{"name": "\xff"}',
        b"[" * 16_000,
        b'{"stock": ' + b"9" * 10_000 + b"}",
    ],
    ids=["cut", "empty", "comma", "array", "number", "null", "not utf-8", "deep", "long number"],
)
async def test_a_body_that_is_no_json_object_is_named(api: str, body: bytes) -> None:
    answer = await call("PUT", f"{api}/v1/items/problems-1", ADMIN | JSON, data=body)
    assert_problem(answer, 400, "malformed")
    assert fields(answer) == {"body"}
    assert len(answer.text) < 1_000


@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/items/problems-2"), ("POST", "/v1/purchases")])
class TestBodyLimits:
    async def test_a_large_body_is_refused(self, api: str, method: str, path: str) -> None:
        answer = await call(method, f"{api}{path}", ADMIN | JSON, data=b" " * 16_385)
        assert_problem(answer, 413, "too-large")

    async def test_a_body_of_unknown_size_is_refused_once_it_is_large(self, api: str, method: str, path: str) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(17):
                yield b" " * 1_024

        answer = await call(method, f"{api}{path}", ADMIN | JSON, data=chunks())
        assert_problem(answer, 413, "too-large")

    @pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
    async def test_another_content_type_is_refused(self, api: str, method: str, path: str, content_type: str) -> None:
        answer = await call(method, f"{api}{path}", ADMIN | {"Content-Type": content_type}, data=ITEM)
        assert_problem(answer, 415, "not-json")


async def test_a_request_that_should_have_no_body_is_held_to_the_same(api: str) -> None:
    url = f"{api}/v1/purchases/{'0' * 32}"
    assert_problem(await call("DELETE", url, SHOP | {"Content-Type": "text/plain"}, data=b"why"), 415, "not-json")
    assert_problem(await call("GET", f"{api}/healthz", JSON, data=b" " * 16_385), 413, "too-large")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON ;charset=UTF-8"])
async def test_parameters_of_the_content_type_are_allowed(api: str, content_type: str) -> None:
    answer = await call("PUT", f"{api}/v1/items/problems-3", ADMIN | {"Content-Type": content_type}, data=ITEM)
    assert answer.status in {200, 201}


async def test_the_largest_body_is_taken(api: str) -> None:
    answer = await call("PUT", f"{api}/v1/items/problems-4", ADMIN | JSON, data=ITEM.ljust(16_384))
    assert answer.status in {200, 201}


async def test_a_body_in_chunks_is_taken(api: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in ITEM:
            yield bytes([byte])

    answer = await call("PUT", f"{api}/v1/items/problems-5", ADMIN | JSON, data=chunks())
    assert answer.status in {200, 201}


async def test_half_a_body_is_not_a_request(api: str) -> None:
    host, port = api.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = "PUT /v1/items/problems-6 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer admin-secret\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    writer.write(f"{len(ITEM):x}\r\n".encode() + ITEM + b"\r\n")  # a whole item, but not the end of the body
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await call("GET", f"{api}/healthz")).status == 200
    assert_problem(await call("GET", f"{api}/v1/items/problems-6", SHOP), 404, "unknown-item")
