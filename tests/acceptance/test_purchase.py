"""Purchases as a buyer meets them, over HTTP, on the running service."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import uuid
from contextlib import closing
from typing import Any

from tests.acceptance.service import Service, eventually
from tests.acceptance.shop import FINAL_WITHIN, Shop


async def test_a_whole_purchase(service: Service, shop: Shop, sku: str) -> None:
    token = f"tok_visa_{secrets.token_hex(12)}"
    created = await shop.put_item(sku, stock=3, price=1200)
    assert (created.status, created.body["available"]) == (201, 3)

    accepted = await shop.buy(sku, quantity=2, customer="c-42", token=token)
    assert accepted.status == 202
    purchase_id = accepted.body["id"]
    assert accepted.headers["Location"] == f"/v1/purchases/{purchase_id}"
    assert "Retry-After" in accepted.headers
    assert not accepted.replayed

    bought = await shop.final(purchase_id)
    assert bought["status"] == "confirmed"
    assert (bought["item"], bought["quantity"], bought["customer"]) == (sku, 2, "c-42")
    assert (bought["amount"], bought["currency"], bought["position"]) == (2400, "EUR", None)
    assert bought["accepted_at"] < bought["decided_at"] < bought["finished_at"]

    charges = service.ledger(purchase_id)
    assert [(charge["id"], charge["status"], charge["amount"]) for charge in charges] == [
        (bought["charge_id"], "succeeded", 2400)
    ]
    item = await shop.item(sku)
    assert (item["stock"], item["available"], item["held"], item["sold"]) == (3, 1, 0, 2)
    assert token not in json.dumps([accepted.body, bought])


async def test_the_token_is_kept_nowhere(service: Service, shop: Shop, sku: str) -> None:
    token = f"tok_visa_{secrets.token_hex(12)}"
    declining = f"tok_declined_{secrets.token_hex(12)}"
    await shop.put_item(sku, stock=2)
    ids = [(await shop.buy(sku, token=one)).body["id"] for one in (token, declining)]
    statuses = [(await shop.final(purchase_id))["status"] for purchase_id in ids]
    assert statuses == ["confirmed", "declined"]

    for secret in (token, declining):
        assert tables_with(service, secret) == []
        assert files_with(service, secret) == []
    # The same search finds what is there, and Valkey's file holds all that was ever sent to it, messages included.
    assert "purchases" in tables_with(service, ids[0][:8])
    assert any("valkey" in name for name in files_with(service, ids[0]))


def tables_with(service: Service, text: str) -> list[str]:
    """The tables of the database that have a row with this text in any column."""
    tables = service.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'fairlane'")
    return [
        table["tablename"]
        for table in tables
        if service.rows(f"SELECT 1 FROM fairlane.{table['tablename']} t WHERE strpos(t::text, %s) > 0", text)
    ]


def files_with(service: Service, text: str) -> list[str]:
    """The logs of all processes, and the files of Valkey, that hold this text."""
    files = [*service.log_files(), *service.valkey.log.parent.rglob("*")]
    return [str(file) for file in files if file.is_file() and text.encode() in file.read_bytes()]


async def test_five_hundred_at_once_with_one_key_make_one_purchase(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=100)
    order: dict[str, Any] = {"key": str(uuid.uuid4()), "customer": "c-1"}
    replies = await asyncio.gather(*(shop.buy(sku, **order) for _ in range(500)))

    assert {reply.status for reply in replies} <= {200, 202}
    assert sum(not reply.replayed for reply in replies) == 1, "one request made the purchase"
    (purchase_id,) = {reply.body["id"] for reply in replies}
    assert (await shop.final(purchase_id))["status"] == "confirmed"
    assert [row["id"] for row in service.purchases(sku)] == [purchase_id]
    assert len(service.ledger(purchase_id)) == 1
    assert (await shop.item(sku))["sold"] == 1


async def test_the_last_unit_is_still_its_buyers_when_the_reply_was_cut(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=1)
    key = str(uuid.uuid4())
    order: dict[str, Any] = {"key": key, "customer": "c-1"}
    body = {"item": sku, "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}

    # Sent whole, accepted for certain, its reply never read.
    host, _, port = service.url.removeprefix("http://").partition(":")
    with closing(socket.create_connection((host, int(port)), timeout=10)) as connection:
        connection.sendall(raw_purchase(key, body))
        eventually(lambda: service.purchases(sku), FINAL_WITHIN, "the purchase is committed")
    (row,) = service.purchases(sku)
    assert (await shop.final(row["id"]))["status"] == "confirmed"

    late = await shop.buy(sku)
    assert (late.status, late.slug) == (409, "sold-out"), "the item is sold out at the door"

    retried = await shop.buy(sku, **order)
    assert (retried.status, retried.body["id"], retried.replayed) == (200, row["id"], True)
    assert retried.body["status"] == "confirmed"

    # Redis does not know the key any more: Postgres is asked before anything is refused.
    with service.redis() as redis:
        marks = list(redis.scan_iter("fairlane:seen:shop:*"))
        assert marks
        redis.delete(*marks)
    retried = await shop.buy(sku, **order)
    assert (retried.status, retried.body["id"], retried.replayed) == (200, row["id"], True)

    other_body = await shop.buy(sku, **order, quantity=2)
    assert (other_body.status, other_body.slug) == (422, "idempotency-key-reused")
    assert len(service.purchases(sku)) == len(service.ledger(row["id"])) == 1


async def test_a_declined_card_gives_its_unit_to_the_first_on_the_waitlist(
    service: Service, shop: Shop, sku: str
) -> None:
    await shop.put_item(sku, stock=1)
    with service.provider_silent():
        first = (await shop.buy(sku, token="tok_declined")).body["id"]
        await shop.until(first, "charging")
        second = (await shop.buy(sku)).body["id"]
        assert (await shop.until(second, "waitlisted"))["reason"] == "waiting_for_stock"
        third = await shop.buy(sku)
        assert (third.status, third.slug) == (503, "queue-full"), "one waits already for the one that may fall back"
        assert int(third.headers["Retry-After"]) >= 1

    outcomes = [(await shop.final(purchase_id))["status"] for purchase_id in (first, second)]
    assert outcomes == ["declined", "confirmed"]
    assert [charge["reference"] for charge in service.ledger(first, second)] == [first, second]
    late = await shop.buy_insisting(sku)
    assert (late.status, late.slug) == (409, "sold-out")
    item = await shop.item(sku)
    assert (item["available"], item["held"], item["sold"]) == (0, 0, 1)


async def test_a_request_cut_in_its_middle_is_nothing(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=100)
    host, _, port = service.url.removeprefix("http://").partition(":")
    body = {"item": sku, "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}
    for number in range(20):
        whole = raw_purchase(f"{sku}-{number}", body)
        with closing(socket.create_connection((host, int(port)), timeout=10)) as connection:
            connection.sendall(whole[: -1 - number])
    purchase_id = (await shop.buy(sku)).body["id"]
    assert (await shop.final(purchase_id))["status"] == "confirmed"
    assert [row["id"] for row in service.purchases(sku)] == [purchase_id]
    assert "internal_error" not in service.processes["web"].logs(), "a client that hangs up is no error of ours"


async def test_a_purchase_is_shown_to_its_own_client_only(shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=1)
    purchase_id = (await shop.buy(sku)).body["id"]
    other = await shop.send("GET", f"/v1/purchases/{purchase_id}", secret="other-secret")
    assert (other.status, other.slug) == (404, "unknown-purchase")


def purchase_headers(key: str) -> dict[str, str]:
    return {"Authorization": "Bearer shop-secret", "Content-Type": "application/json", "Idempotency-Key": key}


def raw_purchase(key: str, body: dict[str, Any]) -> bytes:
    """A whole HTTP request to buy."""
    content = json.dumps(body).encode()
    headers = purchase_headers(key) | {"Host": "shop", "Content-Length": str(len(content))}
    head = "\r\n".join(["POST /v1/purchases HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())])
    return f"{head}\r\n\r\n".encode() + content
