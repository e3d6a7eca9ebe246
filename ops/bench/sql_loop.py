"""The limit of deciding: one SQL statement per batch on one connection, over the same schema and the same rows.

It leaves out all that Fairlane does beside: no lane's lock, no waitlist, no limit per customer, no opening hours, no
watermark, nothing for those who wait for an answer, nobody called. Neither can it be stopped, killed or run twice.
"""

from __future__ import annotations

import psycopg

#: Rows in one statement: the best of 500, 1,000 and 2,000.
BATCH = 2_000

# What the CHECKs of the schema demand of a decided purchase is written, and no more.
_DECIDE = b"""
WITH item AS MATERIALIZED (
    SELECT sku, lane, available, hold_seconds FROM fairlane.items WHERE sku = %(sku)s FOR NO KEY UPDATE
), line AS MATERIALIZED (
    SELECT p.id, p.quantity, sum(p.quantity) OVER (ORDER BY p.seq) <= item.available AS served, item.hold_seconds
    FROM item CROSS JOIN LATERAL (
        SELECT id, seq, quantity FROM fairlane.purchases
        WHERE lane = item.lane AND status = 'queued' AND item = item.sku ORDER BY seq LIMIT %(batch)s
    ) AS p
), decided AS (
    UPDATE fairlane.purchases p
    SET status = CASE WHEN line.served THEN 'reserved' ELSE 'sold_out' END,
        rev = p.rev + 1,
        decided_at = now(),
        due_at = CASE WHEN line.served THEN now() END,
        expires_at = CASE WHEN line.served THEN now() + make_interval(secs => line.hold_seconds) END,
        finished_at = CASE WHEN NOT line.served THEN now() END,
        payment_token = CASE WHEN line.served THEN p.payment_token END
    FROM line WHERE p.id = line.id
    RETURNING p.quantity, line.served
), sums AS (
    SELECT count(*) AS decided, coalesce(sum(quantity) FILTER (WHERE served), 0) AS taken FROM decided
), stocked AS (
    UPDATE fairlane.items i SET available = i.available - sums.taken, unpaid = i.unpaid + sums.taken, rev = i.rev + 1
    FROM sums WHERE i.sku = %(sku)s
)
SELECT decided FROM sums
"""


def decide_with_sql(database: str, sku: str) -> int:
    """Decide every queued purchase of this item; returns how many those were. `database` is a libpq URL."""
    decided = 0
    with psycopg.connect(database, autocommit=True) as connection:
        while True:
            row = connection.execute(_DECIDE, {"sku": sku, "batch": BATCH}).fetchone()
            if row is None or row[0] == 0:
                return decided
            decided += row[0]
