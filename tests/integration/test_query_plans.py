"""The statements of every hot path use the index they were given, on tables of a realistic size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import TextClause, text

from shared.database import transaction
from shared.statements import accept, admit, cancel, charge, decide, recover, review, sweep
from tests.integration.shopfloor import Shop

#: Forty items over 16 lanes; 40,000 purchases, of which one in twenty is still open, as late in a sale.
FILL = """
INSERT INTO fairlane.items (sku, lane, name, price, currency, stock, available, unpaid, hold_seconds)
SELECT 'sku-' || n, n % 16, 'n', 500, 'EUR', 100000, 0, 50000, 900 FROM generate_series(0, 39) n;

INSERT INTO fairlane.purchases
    (id, seq, client_id, idempotency_key, fingerprint, item, lane, quantity, customer, payment_token, amount, currency,
     status, attempt, fence, charge_id, due_at, expires_at, decided_at, finished_at)
SELECT gen_random_uuid(), n, 'shop', md5(n::text), '\\x00', 'sku-' || item, item % 16, 1, 'c-' || n,
       CASE WHEN NOT final THEN 'tok' END, 500, 'EUR', status, CASE WHEN status = 'confirmed' THEN 1 ELSE 0 END,
       CASE WHEN status = 'confirmed' THEN n END, CASE WHEN status = 'confirmed' THEN 'ch' END,
       CASE WHEN status = 'reserved' THEN now() - interval '1 s' END,
       CASE WHEN status = 'reserved' THEN now() + interval '900 s' END,
       CASE WHEN status NOT IN ('queued', 'waitlisted') THEN now() END, CASE WHEN final THEN now() END
FROM (
    SELECT n, n % 40 AS item, status, status IN ('confirmed', 'sold_out') AS final
    FROM (
        SELECT n, CASE WHEN n > 39300 THEN 'queued' WHEN n > 38700 THEN 'waitlisted' WHEN n > 38000 THEN 'reserved'
                       WHEN n % 2 = 0 THEN 'confirmed' ELSE 'sold_out' END AS status
        FROM generate_series(1, 40000) n
    ) AS statuses
) AS rows;

INSERT INTO fairlane.charge_attempts (purchase_id, attempt, fence, worker, claimed_at, call_deadline)
SELECT id, attempt, fence, 'w', now(), now() FROM fairlane.purchases WHERE fence IS NOT NULL;

ANALYZE fairlane.items, fairlane.purchases, fairlane.charge_attempts, fairlane.lanes;
"""

KEYS = [f"key-{n}" for n in range(200)]
WANTED_KEYS = json.dumps([{"client_id": "shop", "idempotency_key": key} for key in KEYS])

#: Either holds exactly the reserved purchases; which is cheaper depends on how many of them are due.
RESERVED = "purchases_due", "purchases_expiring"

QUESTIONS: dict[str, tuple[TextClause, Mapping[str, Any], str | tuple[str, ...]]] = {
    "the head of a lane": (decide.READ_QUEUED, {"lane": 3, "batch": 500}, "purchases_queued"),
    "the waitlists that move": (decide.WAITLISTS_THAT_MOVE, {"lane": 3}, "purchases_waitlisted"),
    "the heads of waitlists": (
        decide.READ_WAITLISTED,
        {"lane": 3, "items": ["sku-3"], "batch": 500},
        "purchases_waitlisted",
    ),
    "the ends of waitlists": (decide.LAST_WAITLISTED, {"lane": 3, "skus": ["sku-3"]}, "purchases_waitlisted"),
    "what customers hold": (
        decide.HOLDINGS,
        {"items": ["sku-3"] * 50, "clients": ["shop"] * 50, "customers": [f"c-{n}" for n in range(50)]},
        "purchases_held",
    ),
    "how many units of items wait": (admit.WAITING, {"skus": ["sku-3", "sku-4"]}, "purchases_waiting"),
    "a claim": (charge.CLAIM, {"slots": 64, "worker": "w", "overdue_after": 20.0}, RESERVED),
    "lanes to call after holds ended": (charge.LANES_WITH_WAITLISTS, {"skus": ["sku-3"]}, "purchases_waitlisted"),
    "purchases by key": (accept.BY_KEY, {"keys": WANTED_KEYS}, "one_key_one_purchase"),
    "the lanes that were forgotten": (sweep.LANES, {}, "purchases_queued"),
    "all waitlists that move": (sweep.LANES_WITH_MOVING_WAITLISTS, {}, "purchases_waitlisted"),
    "what there is to do": (sweep.DUE, {}, RESERVED),
    "claims without an outcome": (recover.MARK_IN_DOUBT, {"batch": 500}, "purchases_overdue"),
    "holds that ran out": (recover.EXPIRE, {"batch": 500, "item": None}, "purchases_expiring"),
    "a purchase to cancel": (cancel.LOCK, {"id": "0" * 32, "client": "shop"}, "purchases_pkey"),
    "what only an operator can settle": (review.IN_REVIEW, {"id": None}, "purchases_in_review"),
    "questions to the provider": (
        recover.CLAIM_QUESTIONS,
        {"batch": 50, "lease": 15.0, "settle_window": 60.0},
        "purchases_in_doubt",
    ),
}


def names(meant: str | tuple[str, ...]) -> set[str]:
    return {meant} if isinstance(meant, str) else set(meant)


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


async def test_every_question_uses_the_index_meant_for_it(shop: Shop, subtests: pytest.Subtests) -> None:
    shop.sql(FILL)
    for name, (statement, values, meant) in QUESTIONS.items():
        with subtests.test(name):
            async with shop.engine.connect() as connection:
                explained = await connection.execute(text(f"EXPLAIN (FORMAT JSON) {statement.text}"), dict(values))
                found = list(nodes(explained.scalar_one()[0]["Plan"]))
            assert {node.get("Index Name") for node in found} & names(meant)
            scanned = [
                node for node in found if node["Node Type"] == "Seq Scan" and node["Relation Name"] == "purchases"
            ]
            assert scanned == []


async def test_a_long_waitlist_is_read_by_the_batch_and_never_sorted_whole(shop: Shop) -> None:
    shop.sql(FILL)
    shop.sql(
        "UPDATE fairlane.purchases SET status = 'waitlisted', decided_at = NULL, finished_at = NULL,"
        " payment_token = 'tok' WHERE status = 'sold_out'"
    )
    shop.sql("ANALYZE fairlane.purchases")
    values = {"lane": 3, "items": ["sku-3", "sku-19"], "batch": 5}
    async with shop.engine.connect() as connection:
        statement = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {decide.READ_WAITLISTED.text}")
        plan = (await connection.execute(statement, values)).scalar_one()[0]["Plan"]
    read = [node["Actual Rows"] for node in nodes(plan) if node.get("Index Name") == "purchases_waitlisted"]
    assert read
    assert max(read) <= 5


async def test_a_claim_reads_no_more_than_it_takes_when_the_statistics_are_from_before_the_rush(shop: Shop) -> None:
    """Nobody was waiting then, so the planner believes that every way to the few who are due is as good as any."""
    shop.sql("ANALYZE fairlane.purchases")
    shop.sql(FILL.partition("INSERT INTO fairlane.charge_attempts")[0])
    async with transaction(shop.engine, shop.settings) as connection:
        statement = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {charge.CLAIM.text}")
        values = {"slots": 20, "worker": "w", "overdue_after": 20.0}
        plan = (await connection.execute(statement, values)).scalar_one()[0]["Plan"]
        await connection.rollback()
    found = [node for node in nodes(plan) if node.get("Relation Name") == "purchases"]
    read = {node.get("Index Name"): node["Actual Rows"] * node["Actual Loops"] for node in found}
    assert read.get("purchases_due") == 20, read
    assert max(read.values()) == 20


async def test_waiting_units_are_counted_by_the_index_and_no_further_than_needed(shop: Shop) -> None:
    """Also beside one hot item of which everything waits: the planner then takes every item for a common one."""
    await shop.item("hot", stock=100)
    await shop.item("other", stock=100)
    shop.sql("""
        INSERT INTO fairlane.purchases
            (id, seq, client_id, idempotency_key, fingerprint, item, lane, quantity, customer, payment_token, amount,
             currency)
        SELECT gen_random_uuid(), n, 'shop', n::text, '', 'hot', 3, 1, 'c', 'tok', 500, 'EUR'
        FROM generate_series(1, 20000) n
    """)
    shop.sql("ANALYZE fairlane.purchases, fairlane.items")
    async with shop.engine.connect() as connection:
        statement = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {admit.WAITING.text}")
        plan = (await connection.execute(statement, {"skus": ["hot", "other"]})).scalar_one()[0]["Plan"]
    (read,) = [node for node in nodes(plan) if node.get("Relation Name") == "purchases"]
    assert read.get("Index Name") == "purchases_waiting"
    # Rows of both items together, of which the other has none.
    assert read["Actual Rows"] * read["Actual Loops"] == admit.COUNTED + 1


async def test_every_index_is_used_by_a_question_or_keeps_a_promise(shop: Shop) -> None:
    rows = shop.sql("SELECT indexname FROM pg_indexes WHERE schemaname = 'fairlane' AND tablename = 'purchases'")

    asked = {index for _, _, meant in QUESTIONS.values() for index in names(meant)}
    assert {row["indexname"] for row in rows} == asked | {"purchases_pkey", "purchases_seq_key"}
