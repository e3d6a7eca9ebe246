"""Every answer tells a browser what it may do with it, whoever made the answer."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from tests.integration.api_process import connected
from tests.integration.http_calls import ADMIN, SHOP, Answer, call

JSON = {"Content-Type": "application/json"}
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"

ANSWERS: list[tuple[str, str, dict[str, str], bytes | None, int]] = [
    ("GET", "/healthz", {}, None, 200),
    ("HEAD", "/healthz", {}, None, 200),
    ("OPTIONS", "/v1/purchases", {}, None, 204),
    ("GET", "/v1/items", SHOP, None, 200),
    ("GET", "/metrics", {}, None, 200),
    ("GET", "/openapi.json", {}, None, 200),
    ("POST", "/v1/purchases", ADMIN | JSON, b"{", 400),
    ("POST", "/v1/purchases", {}, None, 401),
    ("PUT", "/v1/items/x", SHOP | JSON, b"{}", 403),
    ("GET", "/nowhere", {}, None, 404),
    ("GET", f"/v1/status/{'0' * 32}", {}, None, 404),
    ("PATCH", "/v1/purchases", {}, None, 405),
    ("POST", "/v1/purchases", ADMIN | JSON, b" " * 20_000, 413),
    ("POST", "/v1/purchases", ADMIN | {"Content-Type": "text/plain"}, b"{}", 415),
    ("GET", "/docs", {}, None, 200),
    ("GET", "/docs/start.js", {}, None, 200),
    ("GET", "/docs/swagger-ui.css", {}, None, 200),
    ("GET", "/problems", {}, None, 200),
    ("GET", "/problems/sold-out", {}, None, 200),
    ("GET", "/problems/no-such", {}, None, 404),
]
#: They have a page, which may load what the page is made of.
PAGES = ("/docs", "/problems", "/problems/sold-out")
MAY_BE_KEPT = ("/docs/start.js", "/docs/swagger-ui.css", "/problems", "/problems/sold-out")


def assert_guarded(answer: Answer) -> None:
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Resource-Policy": "same-origin",
    }.items():
        assert answer.headers.getall(name) == [value]
    (policy,) = answer.headers.getall("Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert policy.endswith("frame-ancestors 'none'")
    assert len(answer.headers.getall("Cache-Control")) == 1
    assert len(answer.headers.getall("X-Request-Id")) == 1


@pytest.mark.parametrize(("method", "path", "headers", "body", "status"), ANSWERS)
async def test_every_answer_has_them(
    api: str, method: str, path: str, headers: dict[str, str], body: bytes | None, status: int
) -> None:
    answer = await call(method, f"{api}{path}", headers, data=body)
    assert answer.status == status
    assert_guarded(answer)
    if path not in PAGES:
        assert answer.headers["Content-Security-Policy"] == DATA_POLICY
    if path not in MAY_BE_KEPT:
        assert answer.headers["Cache-Control"] == "no-store"


async def test_answers_of_the_server_itself_have_them(api: str) -> None:
    async with connected(api) as connection:
        connection.send("nonsense\r\n\r\n")
        answer = await connection.answer()
    assert (answer.status, answer.slug) == (400, "malformed")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["content-security-policy"] == DATA_POLICY
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]


async def test_a_purchase_keeps_what_it_says_itself(api: str) -> None:
    await call("PUT", f"{api}/v1/items/guarded", ADMIN, {"name": "T", "stock": 1, "price": 1, "currency": "EUR"})
    order = {"item": "guarded", "quantity": 1, "customer": "c", "payment_token": "tok_visa"}
    bought = await call("POST", f"{api}/v1/purchases", SHOP | {"Idempotency-Key": "guarded-1"}, order)
    assert_guarded(bought)
    assert bought.headers["Cache-Control"] == "no-store"
    shown = await call("GET", f"{api}{bought.headers['Location']}", SHOP)
    assert_guarded(shown)
    assert shown.headers["Cache-Control"] == "private, no-cache"


async def test_the_documentation_runs_no_script_but_its_files(api: str) -> None:
    page = await call("GET", f"{api}/docs")
    policy = page.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    scripts = re.findall(r"<script([^>]*)>([^<]*)</script>", page.text)
    assert [(attributes.strip(), text) for attributes, text in scripts] == [
        ('src="/docs/swagger-ui-bundle.js"', ""),
        ('src="/docs/start.js"', ""),
    ]
    assert "onload" not in page.text


@pytest.mark.parametrize("path", ["/problems", "/problems/sold-out"])
async def test_a_problem_page_has_the_one_style_its_policy_names(api: str, path: str) -> None:
    page = await call("GET", f"{api}{path}")
    (style,) = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in page.headers["Content-Security-Policy"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert "<script" not in page.text
    assert " style=" not in page.text
