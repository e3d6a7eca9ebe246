from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import msgspec

from producers.problems import CATALOGUE
from producers.purchases_described import REQUEST_EXAMPLE
from tests.integration.http_calls import ADMIN, SHOP, call

OPERATIONS = {
    ("post", "/v1/purchases"): {200, 202, 400, 401, 404, 409, 413, 415, 422, 429, 500, 503},
    ("get", "/v1/purchases/{id}"): {200, 304, 401, 404, 500, 503},
    ("get", "/v1/purchases/{id}/events"): {200, 204, 401, 404, 500, 503},
    ("get", "/v1/status/{id}"): {200, 304, 404, 500, 503},
    ("get", "/v1/status/{id}/events"): {200, 204, 404, 500, 503},
    ("delete", "/v1/purchases/{id}"): {200, 401, 404, 409, 500, 503},
    ("get", "/v1/items"): {200, 400, 401, 500, 503},
    ("put", "/v1/items/{sku}"): {200, 201, 400, 401, 403, 409, 412, 413, 415, 500, 503},
    ("get", "/v1/items/{sku}"): {200, 304, 400, 401, 404, 500, 503},
    ("get", "/healthz"): {200},
    ("get", "/readyz"): {200, 503},
    ("get", "/metrics"): {200, 503},
}
#: What the server may answer to any request.
FROM_THE_SERVER = {
    400: "malformed",
    408: "request-timeout",
    413: "too-large",
    415: "not-json",
    431: "headers-too-large",
}


async def document(api: str) -> dict[str, Any]:
    answer = await call("GET", f"{api}/openapi.json")
    assert answer.status == 200
    found: dict[str, Any] = answer.json
    return found


async def test_every_operation_is_described_with_every_status(api: str) -> None:
    found = await document(api)
    described = {
        (method, path): {int(status) for status in operation["responses"]}
        for path, item in found["paths"].items()
        for method, operation in item.items()
    }
    assert described == {operation: statuses | FROM_THE_SERVER.keys() for operation, statuses in OPERATIONS.items()}
    assert found["openapi"].startswith("3.1")
    assert found["info"]["version"] == version("fairlane")


async def test_every_reference_resolves_and_nothing_of_the_framework_is_left(api: str) -> None:
    found = await document(api)
    text = msgspec.json.encode(found).decode()
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in found["components"]["schemas"]
    assert "HTTPValidationError" not in text


async def test_every_error_is_described_as_a_problem_that_exists(api: str) -> None:
    found = await document(api)
    for item in found["paths"].values():
        for operation in item.values():
            for status, response in operation["responses"].items():
                if int(status) < 400:
                    continue
                content = response["content"]["application/problem+json"]
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
                for slug, example in content["examples"].items():
                    assert example["value"]["status"] == CATALOGUE[slug].status == int(status)


async def test_what_any_request_may_be_answered_is_described_beside_the_operations_own(api: str) -> None:
    paths = (await document(api))["paths"]
    for item in paths.values():
        for operation in item.values():
            for status, slug in FROM_THE_SERVER.items():
                response = operation["responses"][str(status)]
                assert slug in response["content"]["application/problem+json"]["examples"]
                assert f"`{slug}`" in response["description"]
    own = paths["/v1/purchases"]["post"]["responses"]["400"]
    assert {"malformed", "idempotency-key-missing"} <= own["content"]["application/problem+json"]["examples"].keys()
    assert "RateLimit-Policy" in own["headers"]
    # An operation without a body has no field that could be wrong.
    servers = paths["/healthz"]["get"]["responses"]["400"]["content"]["application/problem+json"]["examples"]
    assert "errors" not in servers["malformed"]["value"]
    assert "errors" in own["content"]["application/problem+json"]["examples"]["malformed"]["value"]


async def test_keys_are_asked_for_under_v1_and_not_for_the_public_status(api: str) -> None:
    found = await document(api)
    assert found["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, item in found["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == (path.startswith("/v1/") and not path.startswith("/v1/status/"))


async def test_the_example_of_a_purchase_is_taken_and_answered_as_described(api: str) -> None:
    schemas = (await document(api))["components"]["schemas"]
    assert set(REQUEST_EXAMPLE) == set(schemas["PurchaseRequest"]["properties"])
    await call("PUT", f"{api}/v1/items/{REQUEST_EXAMPLE['item']}", ADMIN, {
        "name": "Ticket", "stock": 1_000, "price": 4900, "currency": "EUR",
    })  # fmt: skip
    bought = await call("POST", f"{api}/v1/purchases", SHOP | {"Idempotency-Key": uuid4().hex}, REQUEST_EXAMPLE)
    assert bought.status == 202, bought.text
    described = schemas["Purchase"]["properties"]
    assert list(bought.json) == list(described) == schemas["Purchase"]["required"]
    assert re.fullmatch(described["id"]["pattern"], bought.json["id"])
    assert bought.json["status"] in described["status"]["enum"]
    shown = await call("GET", f"{api}{bought.headers['Location']}", SHOP)
    assert shown.status == 200
    assert list(shown.json) == list(described)
    assert "ETag" in shown.headers
    assert "Retry-After" in shown.headers
    public = await call("GET", f"{api}/v1/status/{bought.json['id']}")
    assert list(public.json) == list(schemas["PurchaseStatus"]["properties"])


async def test_the_page_loads_its_files_from_here_and_forbids_others(api: str) -> None:
    page = await call("GET", f"{api}/docs")
    assert page.status == 200
    assert "http://" not in page.text
    assert "https://" not in page.text
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        asset = await call("GET", f"{api}{path}")
        assert asset.status == 200
        assert asset.headers["Content-Type"].split(";")[0] in {"text/javascript", "text/css"}


async def test_swagger_ui_knows_openapi_3_1(api: str) -> None:
    script = (await call("GET", f"{api}/docs/swagger-ui-bundle.js")).text
    found = re.search(r'PACKAGE_VERSION:"(\d+)\.', script)
    assert found is not None
    assert int(found[1]) >= 5
