"""What a wrong request to buy is told, over HTTP on the running service, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict

from tests.acceptance.service import Service

GOOD: dict[str, Any] = {"item": "bad-input", "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}
KEY = "bad-input-key"
MISSING = object()


@dataclass(frozen=True)
class Case:
    """One wrong request. Headers and body fields are changes to a good one; MISSING leaves one out."""

    name: str
    status: int
    slug: str
    field: str | None = None
    headers: tuple[tuple[str, Any], ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()
    raw: bytes | None = None


def key(name: str, *values: Any) -> Case:
    """A request whose idempotency key is bad."""
    headers = tuple(("Idempotency-Key", value) for value in values) or (("Idempotency-Key", MISSING),)
    return Case(f"key: {name}", 400, "idempotency-key-missing", headers=headers)


def field(name: str, value: Any) -> Case:
    """A request with one bad field, which the answer names."""
    shown = "missing" if value is MISSING else json.dumps(value)[:24]
    return Case(f"{name}: {shown}", 400, "malformed", name, fields=((name, value),))


def body(name: str, raw: bytes) -> Case:
    """A request whose body is no object with fields."""
    return Case(f"body: {name}", 400, "malformed", "body", raw=raw)


CASES = [
    key("missing"),
    key("empty", ""),
    key("256 characters", "k" * 256),
    key("a space inside", "a b"),
    key("not ASCII", "schlüssel"),
    key("a tab inside", "a\tb"),
    key("an empty quoted string", '""'),
    key("two", "one", "two"),
    Case("item: unknown", 404, "unknown-item", fields=(("item", "nobody-sells-this"),)),
    *(
        field("item", value)
        for value in (MISSING, "", "a b", "a" * 65, "ä", "a\x00", "a/b", "'; DROP TABLE", 5, None, ["bad-input"])
    ),
    *(
        field("quantity", value)
        for value in (MISSING, 0, -1, 1001, 2**31, 2**63, 2**64, 10**30, 1.5, 1e9, "1", True, None, [1], {})
    ),
    *(
        field("customer", value)
        for value in (MISSING, "", "c" * 256, "c\x00", "c\n", "c\x1f", "c\x7f", "c\u2028", 5, None)
    ),
    *(field("payment_token", value) for value in (MISSING, "", "t" * 256, "t\x00", "t\r", "t\x1b", 5, None)),
    field("price", 1),
    field("Quantity", 1),
    body("empty", b""),
    body("cut", b'{"item": "bad-input"'),
    body("a comma too many", json.dumps(GOOD).encode()[:-1] + b",}"),
    body("two objects", json.dumps(GOOD).encode() * 2),
    body("array", b"[]"),
    body("array of purchases", json.dumps([GOOD]).encode()),
    body("string", b'"buy"'),
    body("number", b"5"),
    body("null", b"null"),
    body("not UTF-8", json.dumps(GOOD).encode().replace(b"c-1", b"c-\xff")),
    body("half a surrogate pair", json.dumps(GOOD).encode().replace(b"c-1", b"c-\\ud800")),
    body("NUL after it", json.dumps(GOOD).encode() + b"\x00"),
    body("NaN", json.dumps(GOOD).encode().replace(b": 1,", b": NaN,")),
    body("deep", b"[" * 10_000),
    Case("body: 17 KiB", 413, "too-large", fields=(("customer", "c" * 17 * 1024),)),
    Case("type: text", 415, "not-json", headers=(("Content-Type", "text/plain"),)),
    Case("type: form", 415, "not-json", headers=(("Content-Type", "application/x-www-form-urlencoded"),)),
    Case("type: like JSON", 415, "not-json", headers=(("Content-Type", "application/jsonp"),)),
    Case("type: empty", 415, "not-json", headers=(("Content-Type", ""),)),
    Case("auth: none", 401, "unauthorized", headers=(("Authorization", MISSING),)),
    Case("auth: unknown key", 401, "unauthorized", headers=(("Authorization", "Bearer nobody"),)),
    Case("auth: empty", 401, "unauthorized", headers=(("Authorization", ""),)),
    Case("auth: no key", 401, "unauthorized", headers=(("Authorization", "Bearer "),)),
    Case("auth: the name for the key", 401, "unauthorized", headers=(("Authorization", "Bearer shop"),)),
    Case("auth: basic", 401, "unauthorized", headers=(("Authorization", "Basic c2hvcDpzaG9wLXNlY3JldA=="),)),
]


def content(case: Case) -> bytes:
    if case.raw is not None:
        return case.raw
    changed = GOOD | dict(case.fields)
    return json.dumps({name: value for name, value in changed.items() if value is not MISSING}).encode()


def headers(case: Case) -> CIMultiDict[str]:
    changed = {name for name, _ in case.headers}
    good = {
        "Authorization": "Bearer shop-secret",
        "Content-Type": "application/json",
        "Idempotency-Key": KEY,
    }
    kept = [(name, value) for name, value in good.items() if name not in changed]
    return CIMultiDict([*kept, *((name, value) for name, value in case.headers if value is not MISSING)])


@pytest.fixture
async def session(service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    # Without a default Content-Type: a case that has none sends none.
    async with aiohttp.ClientSession(service.url, skip_auto_headers=["Content-Type"]) as opened:
        item = {"name": "Bad input", "stock": 1_000_000, "price": 1, "currency": "EUR"}
        admin = {"Authorization": "Bearer admin-secret"}
        async with opened.put("/v1/items/bad-input", json=item, headers=admin | {"Content-Type": "application/json"}):
            pass
        yield opened


def recorded(service: Service) -> int:
    """How many purchases there are of the item and of the key, and how much of the item was taken."""
    (row,) = service.rows(
        "SELECT (SELECT count(*) FROM fairlane.purchases)"
        " + (SELECT stock - available FROM fairlane.items WHERE sku = 'bad-input') AS count"
    )
    return int(row["count"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_wrong_purchase_is_refused(service: Service, session: aiohttp.ClientSession, case: Case) -> None:
    before = recorded(service)
    async with session.post("/v1/purchases", data=content(case), headers=headers(case)) as reply:
        problem = await reply.json(content_type=None)
        assert (reply.status, reply.headers["Content-Type"]) == (case.status, "application/problem+json"), problem
    assert problem["type"] == f"/problems/{case.slug}", problem
    assert problem["status"] == case.status
    assert problem["title"]
    assert problem["detail"]
    if case.field is not None:
        assert [error["field"] for error in problem["errors"]] == [case.field], problem
    assert recorded(service) == before


async def test_the_request_these_differ_from_is_accepted(service: Service, session: aiohttp.ClientSession) -> None:
    before = recorded(service)
    good = Case("good", 202, "")
    async with session.post("/v1/purchases", data=content(good), headers=headers(good)) as reply:
        assert reply.status == 202, await reply.text()
    assert recorded(service) > before
