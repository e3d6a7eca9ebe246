"""The running service against its own description: schemathesis asks what the OpenAPI document allows, and forbids."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import schemathesis

from producers.purchases_described import REQUEST_EXAMPLE
from tests.acceptance import description_hooks
from tests.acceptance.service import Service
from tests.acceptance.shop import Shop

#: The admin may do everything, so nothing is refused for want of a role.
ADMIN = {"Authorization": "Bearer admin-secret"}
SHOP = {"Authorization": "Bearer shop-secret"}
#: Requests per operation in the fuzzing and the stateful phase; the others have as many as the document needs.
EXAMPLES = 20
#: Longer than a request is held by `Prefer: wait`.
REQUEST_WITHIN = 45
#: Bounds the whole run on a machine that does much else; it takes a fraction of that.
RUN_WITHIN = 540


@pytest.mark.timeout(RUN_WITHIN + 30)
async def test_the_service_keeps_to_its_own_description(
    service: Service, shop: Shop, project_root: Path, tmp_path: Path
) -> None:
    await shop.put_item(REQUEST_EXAMPLE["item"], stock=1_000_000)
    # A process of its own: it asks in threads, and its generators and hooks are global.
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        f"--config-file={_config(tmp_path)}",
        "run",
        f"{service.url}/openapi.json",
        f"--header=Authorization: {ADMIN['Authorization']}",
        "--checks=all",
        # It expects what was deleted to be gone. A purchase that was cancelled is still there, as its key's answer.
        "--exclude-checks=use_after_free",
        "--phases=examples,coverage,fuzzing,stateful",
        f"--max-examples={EXAMPLES}",
        f"--request-timeout={REQUEST_WITHIN}",
        "--seed=4",
        "--continue-on-failure",
        "--no-color",
    ]
    run = await asyncio.to_thread(
        lambda: subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(project_root), "SCHEMATHESIS_HOOKS": description_hooks.__name__},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_WITHIN,
            check=False,
        )
    )
    assert run.returncode == 0, run.stdout[-20_000:]


def _config(directory: Path) -> Path:
    """Nothing is read from the folder the tests were started in, and no examples of earlier runs are kept.

    Data that fits its schema is to be accepted. A schema cannot say everything: that one moment is after another (400),
    that a key was used for another order (422), what ETag an item has (412), or how much of it is sold (409).
    """
    file = directory / "schemathesis.toml"
    file.write_text("""
[generation]
database = "none"

[[operations]]
include-name = "PUT /v1/items/{sku}"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 409, 412]

[[operations]]
include-name = "POST /v1/purchases"
checks.positive_data_acceptance.expected-statuses = ["2xx", 404, 409, 422, 503]
""")
    return file


async def test_every_operation_has_a_good_answer_as_described(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=1)
    with service.provider_silent():
        first = (await shop.buy(sku)).body["id"]
        await shop.until(first, "charging")
        second = (await shop.buy(sku)).body["id"]
        await shop.until(second, "waitlisted")
        schema = await asyncio.to_thread(schemathesis.openapi.from_url, f"{service.url}/openapi.json")
        await _asked(schema, {"DELETE /v1/purchases/{id}": {"path_parameters": {"id": second}, "headers": SHOP}})
    await shop.final(first)
    await _asked(schema, _good_requests(sku, first))
    operations = {f"{method.upper()} {path}" for path, item in schema.raw_schema["paths"].items() for method in item}
    assert {"DELETE /v1/purchases/{id}", *_good_requests(sku, first)} == operations, "each has its good request"


def _good_requests(sku: str, purchase: str) -> dict[str, dict[str, Any]]:
    """For each operation but that of cancelling, what its description lets one ask, of an item and a final purchase."""
    terms = {"name": "Ticket", "stock": 10, "price": 4900, "currency": "EUR"}
    order = {"item": sku, "quantity": 1, "customer": "c-42", "payment_token": "tok_visa"}
    of_purchase = {"path_parameters": {"id": purchase}}
    return {
        "PUT /v1/items/{sku}": {"path_parameters": {"sku": sku}, "headers": ADMIN, "body": terms},
        "GET /v1/items/{sku}": {"path_parameters": {"sku": sku}, "headers": SHOP},
        "GET /v1/items": {"headers": SHOP},
        "POST /v1/purchases": {"headers": SHOP | {"Idempotency-Key": str(uuid.uuid4())}, "body": order},
        "GET /v1/purchases/{id}": of_purchase | {"headers": SHOP},
        "GET /v1/purchases/{id}/events": of_purchase | {"headers": SHOP},
        "GET /v1/status/{id}": of_purchase,
        "GET /v1/status/{id}/events": of_purchase,
        "GET /healthz": {},
        "GET /readyz": {},
        "GET /metrics": {},
    }


async def _asked(schema: Any, requests: dict[str, dict[str, Any]]) -> None:
    """Ask in this order; each answer is good, and as described."""
    for label, request in requests.items():
        method, _, path = label.partition(" ")
        case = schema[path][method].Case(**request)
        if "body" in request:
            case.media_type = "application/json"
        response = await asyncio.to_thread(case.call_and_validate, timeout=REQUEST_WITHIN)
        assert 200 <= response.status_code < 300, (label, response.status_code, response.text)
