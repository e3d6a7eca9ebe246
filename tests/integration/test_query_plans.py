"""The statements of every hot path use the index they were given, on tables of a realistic size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from sqlalchemy import TextClause, text

from shared.database import transaction
from shared.statements import accept, admit, cancel, charge, decide, recover, review, sweep
from tests.integration.plans import FEW, FILL, REFUSALS, RUSH, looked_at, newest, nodes
from tests.integration.shopfloor import Shop

KEYS = [f"key-{n}" for n in range(200)]
WANTED_KEYS = json.dumps([{"client_id": "shop", "idempotency_key": key} for key in KEYS])

QUESTIONS: dict[str, tuple[TextClause, Mapping[str, Any], str]] = {
    "the head of a lane": (decide.READ_QUEUED, {"lane": 3, "batch": 500}, "purchases_queued"),
    "the waitlists of a lane": (decide.WAITLISTS, {"lane": 3}, "purchases_waitlisted"),
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
    "a claim": (charge.CLAIM, {"slots": 64, "worker": "w", "overdue_after": 20.0}, "purchases_due"),
    "lanes to call after holds ended": (charge.LANES_WITH_WAITLISTS, {"skus": ["sku-3"]}, "purchases_waitlisted"),
    "purchases by key": (accept.BY_KEY, {"keys": WANTED_KEYS}, "one_key_one_purchase"),
    "the purchases of keys": (accept.BY_KEY, {"keys": WANTED_KEYS}, "purchases_pkey"),
    "the lanes that were forgotten": (sweep.LANES, {}, "purchases_queued"),
    "all waitlists that move": (sweep.LANES_WITH_MOVING_WAITLISTS, {}, "purchases_waitlisted"),
    "what there is to do": (sweep.DUE, {}, "purchases_due"),
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


async def test_every_question_uses_the_index_meant_for_it(shop: Shop, subtests: pytest.Subtests) -> None:
    shop.sql(FILL)
    for name, (statement, values, meant) in QUESTIONS.items():
        with subtests.test(name):
            async with shop.engine.connect() as connection:
                explained = await connection.execute(text(f"EXPLAIN (FORMAT JSON) {statement.text}"), dict(values))
                found = list(nodes(explained.scalar_one()[0]["Plan"]))
            assert meant in {node.get("Index Name") for node in found}
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


async def purchases_read(
    shop: Shop, plan_cache_mode: str, statement: TextClause, values: Mapping[str, Any]
) -> list[tuple[str, float]]:
    """By which index the statement looks at how many rows of the purchases, also those that it then passes over."""
    async with transaction(shop.engine, shop.settings) as connection:
        await connection.execute(text(f"SET LOCAL plan_cache_mode = {plan_cache_mode}"))
        explained = await connection.execute(text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}"), values)
        plan = explained.scalar_one()[0]["Plan"]
        await connection.rollback()
    return [(index, rows) for relation, index, rows in looked_at(plan) if relation == "purchases"]


#: Statements that change a few purchases beside tens of thousands in the same state, and what they are given.
CHANGES: dict[str, tuple[TextClause, Mapping[str, Any]]] = {
    "verdicts": (decide.WRITE_VERDICTS, {"ids": "queued", **REFUSALS}),
    "a claim": (charge.CLAIM, {"slots": FEW, "worker": "w", "overdue_after": 20.0}),
    "a claim for a known charge": (charge.CLAIM_AGAIN, {"ids": "reserved", "workers": ["w"] * FEW}),
    "outcomes": (charge.RECORD, {"results": "confirmed", "ids": "confirmed"}),
    "where purchases stand": (charge.STANDING, {"ids": "confirmed", "fences": [1] * FEW}),
    "claims without an outcome": (recover.MARK_IN_DOUBT, {"batch": FEW}),
    "holds that ran out": (recover.EXPIRE, {"batch": FEW, "item": None}),
    "questions to the provider": (recover.CLAIM_QUESTIONS, {"batch": FEW, "lease": 15.0, "settle_window": 60.0}),
    "a cancellation": (cancel.CANCEL, {"id": "queued"}),
}


@pytest.mark.parametrize("plan_cache_mode", ["force_custom_plan", "force_generic_plan"])
async def test_a_change_reads_no_more_than_it_changes_when_the_statistics_are_from_before_the_rush(
    shop: Shop, subtests: pytest.Subtests, plan_cache_mode: str
) -> None:
    """Nobody was waiting then, so the planner believes that reading everybody who waits is as good as any way."""
    shop.sql("ANALYZE fairlane.purchases")
    shop.sql(FILL.partition("INSERT INTO fairlane.purchase_keys")[0])
    shop.sql(RUSH)
    ids = newest(shop)
    for name, (statement, given) in CHANGES.items():
        with subtests.test(name):
            values = dict(given)
            if "ids" in values:
                values["ids"] = ids[values["ids"]]
            if "id" in values:
                values["id"] = ids[values["id"]][0]
            if "results" in values:
                values["results"] = json.dumps(
                    [{"id": each, "fence": 1, "status": "confirmed", "charge_id": "ch"} for each in ids["confirmed"]]
                )
            read = await purchases_read(shop, plan_cache_mode, statement, values)
            assert read
            # A sort by a second column reads on until the first one changes.
            assert max(rows for _, rows in read) <= 1.1 * FEW, read


#: Statements that read the first of a line, and how many they may look at.
HEADS: dict[str, tuple[TextClause, Mapping[str, Any], int]] = {
    "the head of a lane": (decide.READ_QUEUED, {"lane": 3, "batch": FEW}, FEW),
    "the heads of waitlists": (decide.READ_WAITLISTED, {"lane": 3, "items": ["sku-3"], "batch": FEW}, FEW),
    "the ends of waitlists": (decide.LAST_WAITLISTED, {"lane": 3, "skus": ["sku-3", "sku-19"]}, 2),
    "the waitlists of a lane": (decide.WAITLISTS, {"lane": 3}, 2),
    "the lanes that were forgotten": (sweep.LANES, {}, 16),
    "all waitlists that move": (sweep.LANES_WITH_MOVING_WAITLISTS, {}, 2),
    "a claim": (charge.CLAIM, {"slots": FEW, "worker": "w", "overdue_after": 20.0}, FEW),
    "what there is to do": (sweep.DUE, {}, 5),
}
#: Nearly everybody waits, for two items; then the first three quarters are settled, and nobody tells the planner.
HEIGHT = """
INSERT INTO fairlane.purchases
    (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency, status,
     due_at, expires_at, decided_at)
SELECT gen_random_uuid(), 100000 + n, 'shop', 'height-' || n, CASE n % 2 WHEN 0 THEN 'sku-3' ELSE 'sku-19' END, 3, 1,
       'c-' || n, 'tok', 500, 'EUR', status, CASE WHEN held THEN now() - interval '1 s' END,
       CASE WHEN held THEN now() + interval '900 s' END, CASE WHEN held THEN now() END
FROM (SELECT n, status, status = 'reserved' AS held
      FROM (SELECT n, (ARRAY['queued', 'waitlisted', 'reserved'])[1 + n % 3] AS status
            FROM generate_series(1, 60000) n) AS statuses) AS rows;
ANALYZE fairlane.purchases;
UPDATE fairlane.purchases SET status = 'sold_out', payment_token = NULL, decided_at = now(), finished_at = now()
WHERE seq BETWEEN 100001 AND 145000
"""


@pytest.mark.parametrize("plan_cache_mode", ["force_custom_plan", "force_generic_plan"])
async def test_the_head_of_a_line_is_read_past_nobody_when_the_statistics_are_from_the_height_of_a_rush(
    shop: Shop, subtests: pytest.Subtests, plan_cache_mode: str
) -> None:
    """Nearly everybody waited then, so the planner believes that any index in the order of `seq` leads to them."""
    shop.sql(FILL.partition("INSERT INTO fairlane.purchases")[0])
    shop.sql(HEIGHT)
    for name, (statement, values, most) in HEADS.items():
        with subtests.test(name):
            read = await purchases_read(shop, plan_cache_mode, statement, values)
            assert read
            # A sort by a second column reads on until the first one changes.
            assert max(rows for _, rows in read) <= 1.1 * most, read


async def test_waiting_units_are_counted_by_the_index_and_no_further_than_needed(shop: Shop) -> None:
    """Also beside one hot item of which everything waits: the planner then takes every item for a common one."""
    await shop.item("hot", stock=100)
    await shop.item("other", stock=100)
    shop.sql("""
        INSERT INTO fairlane.purchases
            (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount,
             currency)
        SELECT gen_random_uuid(), n, 'shop', n::text, 'hot', 3, 1, 'c', 'tok', 500, 'EUR'
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
    rows = shop.sql("SELECT indexname FROM pg_indexes WHERE tablename IN ('purchases', 'purchase_keys')")

    asked = {meant for _, _, meant in QUESTIONS.values()}
    assert {row["indexname"] for row in rows} == asked | {"purchases_pkey", "purchases_seq_key"}
