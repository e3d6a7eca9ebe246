"""Tables of a realistic size, a rush into them, and what a plan says it looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.integration.shopfloor import Shop

#: Forty items over 16 lanes; 40,000 purchases, of which one in twenty is still open, as late in a sale.
FILL = """
INSERT INTO fairlane.items (sku, lane, name, price, currency, stock, available, unpaid, hold_seconds)
SELECT 'sku-' || n, n % 16, 'n', 500, 'EUR', 100000, 0, 50000, 900 FROM generate_series(0, 39) n;

INSERT INTO fairlane.purchases
    (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency,
     status, attempt, fence, charge_id, due_at, expires_at, decided_at, finished_at)
SELECT gen_random_uuid(), n, 'shop', md5(n::text), 'sku-' || item, item % 16, 1, 'c-' || n,
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

INSERT INTO fairlane.purchase_keys (client_id, idempotency_key, purchase_id, fingerprint)
SELECT client_id, idempotency_key, id, '' FROM fairlane.purchases;

INSERT INTO fairlane.charge_attempts (purchase_id, attempt, fence, worker, claimed_at, call_deadline)
SELECT id, attempt, fence, 'w', now(), now() FROM fairlane.purchases WHERE fence IS NOT NULL;

ANALYZE fairlane.items, fairlane.purchases, fairlane.purchase_keys, fairlane.charge_attempts, fairlane.lanes;
"""

#: Everybody comes at once: thousands more in each open state.
RUSH = """
INSERT INTO fairlane.purchases
    (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency,
     status, attempt, fence, due_at, expires_at, decided_at, call_deadline, ask_at, doubt_since)
SELECT gen_random_uuid(), 100000 + n, 'shop', 'rush-' || n, 'sku-3', 3, 1, 'c-' || n, 'tok', 500, 'EUR',
       status, attempt, nullif(attempt, 0), CASE WHEN status = 'reserved' THEN now() - interval '1 s' END,
       CASE WHEN status = 'reserved' THEN now() + CASE n % 8 WHEN 1 THEN interval '-1 s' ELSE interval '900 s' END END,
       CASE WHEN status <> 'queued' THEN now() END, CASE WHEN attempt > 0 THEN now() - interval '1 s' END,
       CASE WHEN status = 'in_doubt' THEN now() - n * interval '1 ms' END, CASE WHEN status = 'in_doubt' THEN now() END
FROM (
    SELECT n, status, (status IN ('charging', 'in_doubt'))::int AS attempt
    FROM (SELECT n, (ARRAY['queued', 'reserved', 'charging', 'in_doubt'])[1 + n % 4] AS status
          FROM generate_series(1, 40000) n) AS statuses
) AS rows
"""

#: How many purchases a statement is given, beside tens of thousands in the same state.
FEW: Final = 500
#: What WRITE_VERDICTS is given of so many, beside their ids.
REFUSALS: Final[Mapping[str, Any]] = {
    "were": ["queued"] * FEW,
    "statuses": ["sold_out"] * FEW,
    "reasons": [None] * FEW,
    "holds": [None] * FEW,
    "decided": ["2026-01-01T00:00Z"] * FEW,
    "finished": ["2026-01-01T00:00Z"] * FEW,
    "lane": 3,
    "decided_through": 100000,
}


def newest(shop: Shop) -> dict[str, list[str]]:
    """The ids of the newest few purchases in each state."""
    rows = shop.sql(
        """
        SELECT status, array_agg(id::text) AS ids FROM (
            SELECT status, id, row_number() OVER (PARTITION BY status ORDER BY seq DESC) AS nth
            FROM fairlane.purchases) AS numbered
        WHERE nth <= %s GROUP BY status
        """,
        FEW,
    )
    return {row["status"]: row["ids"] for row in rows}


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def looked_at(plan: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Of each scan of a table: the table, by which index, and how many rows, also those that were then passed over."""
    return [
        (
            node["Relation Name"],
            node.get("Index Name", node["Node Type"]),
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"],
        )
        for node in nodes(plan)
        if "Relation Name" in node and "Scan" in node["Node Type"]
    ]
