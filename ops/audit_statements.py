"""What the audit asks Postgres. Each statement is one snapshot; each check returns (subject, detail) of what is wrong.

Where one thing must have come before another, 60 seconds lie between them: no transaction of ours lives that long, as
its statements end after 10 s and its pauses after 2 s. What was accepted so much earlier was committed, and a change
of an item so long ago was seen.

*Given* below means: got stock, for good or for a while. A purchase set aside before its decision never did.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sqlalchemy import TextClause, text

ITEMS = text("""
WITH batch AS (
    SELECT i.* FROM fairlane.items i WHERE i.sku > CAST(:after AS text) COLLATE "C" ORDER BY i.sku LIMIT :batch
)
SELECT b.sku, b.lane, b.stock, b.available, b.unpaid,
       coalesce(sum(p.quantity) FILTER (WHERE p.status <> 'confirmed'), 0) AS held,
       coalesce(sum(p.quantity) FILTER (WHERE p.status = 'confirmed'), 0) AS sold
FROM batch b LEFT JOIN fairlane.purchases p
    ON p.item = b.sku AND p.decided_at IS NOT NULL
    AND p.status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')
GROUP BY b.sku, b.lane, b.stock, b.available, b.unpaid
ORDER BY b.sku
""")
"""Items after one, with the units their purchases hold and bought, at one moment."""

COUNTS = text("SELECT status, count(*) AS purchases FROM fairlane.purchases GROUP BY status ORDER BY status")

CHARGED = text("""
SELECT p.id, p.seq, p.rev, p.status, p.charge_id FROM fairlane.purchases p
WHERE p.seq > :after AND p.attempt > 0 ORDER BY p.seq LIMIT :batch
""")
"""Purchases that were claimed for charging at least once, a batch after another. Newcomers join at the end."""

CHARGED_BY_ID = text("""
SELECT p.id, p.seq, p.rev, p.status, p.charge_id FROM fairlane.purchases p WHERE p.id = ANY(CAST(:ids AS uuid[]))
""")

_LANE = text("""
SELECT p.id AS subject, format('is in lane %s, its item %s in lane %s', p.lane, p.item, i.lane) AS detail
FROM fairlane.purchases p JOIN fairlane.items i ON i.sku = p.item WHERE p.lane <> i.lane ORDER BY p.seq
""")

_LIMIT = text("""
SELECT p.item AS subject,
       format('customer %s of %s has %s, the limit is %s', p.customer, p.client_id, sum(p.quantity), i.per_customer)
           AS detail
FROM fairlane.purchases p JOIN fairlane.items i ON i.sku = p.item
WHERE i.per_customer IS NOT NULL AND p.decided_at IS NOT NULL
  AND p.status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')
GROUP BY p.item, p.client_id, p.customer, i.per_customer, i.created_at, i.updated_at
HAVING sum(p.quantity) > i.per_customer
   AND (i.updated_at = i.created_at OR max(p.decided_at) > i.updated_at + interval '60 seconds')
ORDER BY p.item, p.client_id, p.customer
""")
"""A limit lowered later is no fault: the last purchase must have been given its stock under the present one."""

_ORDER = text("""
WITH line AS (
    SELECT p.*, (p.decided_at IS NOT NULL AND p.status NOT IN
        ('sold_out', 'limit_reached', 'cancelled', 'queued', 'waitlisted')) AS given
    FROM fairlane.purchases p
), seen AS (
    SELECT l.id, l.item, l.seq, l.status, l.decided_at,
        min(l.decided_at) FILTER (WHERE l.given) OVER (
            PARTITION BY l.item, l.accepted_at ORDER BY l.seq ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING
        ) AS behind_in_commit,
        min(l.decided_at) FILTER (WHERE l.given) OVER (
            PARTITION BY l.item ORDER BY l.accepted_at
            RANGE BETWEEN interval '60 seconds' FOLLOWING AND UNBOUNDED FOLLOWING
        ) AS behind_in_time
    FROM line l
)
SELECT s.id AS subject,
       format('seq %s of %s is %s, decided %s; one behind it was given stock at %s',
              s.seq, s.item, s.status, coalesce(CAST(s.decided_at AS text), 'never'),
              least(behind_in_commit, behind_in_time))
           AS detail
FROM seen s
WHERE (s.status IN ('queued', 'waitlisted') OR s.decided_at IS NOT NULL)
  AND least(s.behind_in_commit, s.behind_in_time) < coalesce(s.decided_at, 'infinity')
ORDER BY s.seq
""")
"""Overtaken: still waiting, or decided later, while one that surely came later was given stock."""

_REFUSED = text("""
WITH line AS (
    SELECT p.*, (p.decided_at IS NOT NULL AND p.status NOT IN
        ('sold_out', 'limit_reached', 'cancelled', 'queued', 'waitlisted')) AS given
    FROM fairlane.purchases p WHERE p.decided_at IS NOT NULL
), seen AS (
    SELECT l.id, l.item, l.seq, l.status, l.quantity, l.decided_at,
        max(l.quantity) FILTER (WHERE l.given) OVER (
            PARTITION BY l.item, l.decided_at ORDER BY l.seq ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING
        ) AS given_behind,
        max(l.quantity) FILTER (WHERE l.given) OVER (
            PARTITION BY l.item ORDER BY l.decided_at DESC
            RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW EXCLUDE GROUP
        ) AS given_later
    FROM line l
)
SELECT s.id AS subject,
       format('seq %s of %s was refused %s as sold out; %s', s.seq, s.item, s.quantity,
              CASE WHEN s.given_behind >= s.quantity THEN 'one behind it got as many in the same decision'
                   ELSE 'as many were given later' END) AS detail
FROM seen s JOIN fairlane.items i ON i.sku = s.item
WHERE s.status = 'sold_out'
  AND (s.given_behind >= s.quantity OR (s.given_later >= s.quantity AND i.waitlist))
  AND (i.updated_at = i.created_at OR i.updated_at + interval '60 seconds' < s.decided_at)
ORDER BY s.seq
""")
"""Refused as sold out although as many units were given to one behind, or later. Only while the item's terms were the
present ones: after a restock both are right."""

_ATTEMPTS = text("""
SELECT p.id AS subject,
       format('is %s with %s successful attempts (%s)', p.status, count(a.charge_id), string_agg(a.charge_id, ', '))
           AS detail
FROM fairlane.purchases p
LEFT JOIN fairlane.charge_attempts a ON a.purchase_id = p.id AND a.outcome = 'confirmed'
WHERE p.attempt > 0
GROUP BY p.id
HAVING (p.status = 'confirmed' AND (count(a.charge_id) <> 1 OR max(a.charge_id) <> p.charge_id))
    OR (p.status <> 'confirmed' AND count(a.charge_id) > 0)
ORDER BY p.seq
""")
"""Confirmed by anything but one attempt with the same charge, or paid for by an attempt and not confirmed."""

CHECKS: Mapping[str, TextClause] = MappingProxyType(
    {
        "purchase lane": _LANE,
        "customer limit": _LIMIT,
        "order": _ORDER,
        "refused too early": _REFUSED,
        "attempts": _ATTEMPTS,
    }
)
