"""Deciding a lane: read its line under its lock, lock the items, write the verdicts in bulk."""

from __future__ import annotations

from sqlalchemy import text

from shared import doors
from shared.purchases import COLUMNS

LOCK_LANE = text("""
SELECT decided_through, set_config('statement_timeout', :statement_timeout, true) FROM fairlane.lanes
WHERE lane = :lane FOR NO KEY UPDATE
""")
"""Promise: one decision per lane at a time. A statement of its own: the next one's snapshot sees all that was committed
before the lock was granted.

Whoever asks has set `statement_timeout` to LOCK_TIMEOUT; from here on it is the usual one. `lock_timeout` alone would
not do: several who wait for a row stand in two queues, and each has its own. A process that was frozen there would get
the lane when the one before it, frozen as well, has lost it, and keep it for as long again."""

LOCK_LANE_NOWAIT = text(f"{LOCK_LANE.text.rstrip()} NOWAIT")
"""The same for later batches: if somebody else has the lane, they carry on."""

READ_QUEUED = text(f"""
SELECT {COLUMNS},
       EXISTS (SELECT FROM fairlane.purchases w WHERE w.lane = :lane AND w.status = 'waitlisted') AS anybody_waitlisted,
       p.accepted_at AS accepted
FROM fairlane.purchases p
WHERE p.lane BETWEEN :lane AND :lane AND p.status = 'queued'
ORDER BY p.lane, p.seq LIMIT :batch
FOR NO KEY UPDATE
""")
"""Promise: first come, first served. The head of the line in order; no cursor and no SKIP LOCKED, so nothing is passed
over.

The lane is a range of one, and ordered by, so that the line's own index alone has this order. With an equality the
planner may as well go by the index of all `seq`: when its statistics are from the height of a rush it believes that
nearly everybody waits, and each batch then passes over all who were ever settled.

Whether anybody in the lane is waitlisted is told with each row: nearly always nobody is, and then no waitlists are
asked for. Only the lane's own turn adds to one."""

WAITLISTS = text("""
WITH RECURSIVE heads AS (
    (SELECT item, seq, quantity FROM fairlane.purchases
     WHERE lane = :lane AND status = 'waitlisted' ORDER BY item, seq LIMIT 1)
    UNION ALL
    SELECT next.item, next.seq, next.quantity FROM heads h CROSS JOIN LATERAL (
        SELECT item, seq, quantity FROM fairlane.purchases
        WHERE lane = :lane AND status = 'waitlisted' AND item > h.item ORDER BY item, seq LIMIT 1
    ) next
)
SELECT h.item, h.quantity <= i.available OR h.quantity > i.available + i.unpaid OR NOT i.waitlist AS moves
FROM heads h CROSS JOIN LATERAL (SELECT available, unpaid, waitlist FROM fairlane.items WHERE sku = h.item LIMIT 1) i
""")
"""The items of a lane that have a waitlist, and whether it can be settled now: its head can be served, or never will
be. One index probe per item with a waitlist, however long that is. A waitlist that cannot move is not read, so it hides
no other."""

READ_WAITLISTED = text(f"""
SELECT {COLUMNS}, p.accepted_at AS accepted FROM fairlane.purchases p
WHERE CASE p.status WHEN 'waitlisted' THEN true ELSE false END AND p.id = ANY(ARRAY(
    SELECT head.id FROM unnest(CAST(:items AS text[])) AS moving(item) CROSS JOIN LATERAL (
        SELECT w.id, w.seq FROM fairlane.purchases w
        WHERE w.lane = :lane AND w.item BETWEEN moving.item AND moving.item AND w.status = 'waitlisted'
        ORDER BY w.item, w.seq LIMIT :batch
    ) head
    ORDER BY head.seq LIMIT :batch
))
ORDER BY p.seq + 0
FOR NO KEY UPDATE OF p
""")
"""The heads of these waitlists, in order; only a batch of each is read, however long it is. Locked before the queued
rows: waitlisted and queued rows are two disjoint lines, always locked in this order and each by `seq`, and whoever else
locks either locks one row. The item is a range of one, as the lane is in READ_QUEUED."""

LOCK_ITEMS = text("""
SELECT i.*, clock_timestamp() AS now
FROM fairlane.items i
WHERE i.sku = ANY(CAST(:skus AS text[]))
ORDER BY i.sku
FOR NO KEY UPDATE
""")
"""Promise: never oversold. What is available cannot change until the verdicts are committed."""

LAST_WAITLISTED = text("""
SELECT s.sku, last.seq
FROM unnest(CAST(:skus AS text[])) AS s(sku) CROSS JOIN LATERAL (
    SELECT seq FROM fairlane.purchases p
    WHERE p.lane = :lane AND p.item BETWEEN s.sku AND s.sku AND p.status = 'waitlisted'
    ORDER BY p.item DESC, p.seq DESC LIMIT 1
) last
""")
"""Where each item's waitlist ends: a newcomer does not pass a waitlist that is not wholly part of the batch."""

HOLDINGS = text("""
SELECT c.item, c.client_id, c.customer, held.quantity
FROM unnest(CAST(:items AS text[]), CAST(:clients AS text[]), CAST(:customers AS text[]))
    AS c(item, client_id, customer)
CROSS JOIN LATERAL (
    SELECT sum(p.quantity) AS quantity FROM fairlane.purchases p
    WHERE p.item = c.item AND p.client_id = c.client_id AND p.customer = c.customer AND p.decided_at IS NOT NULL
      AND CASE WHEN p.status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')
          THEN true ELSE false END
) held
WHERE held.quantity IS NOT NULL
""")
"""What these customers hold of these items already. Exact: only their own lane gives them more."""

WRITE_VERDICTS = text("""
WITH advanced AS (
    UPDATE fairlane.lanes SET decided_through = :decided_through WHERE lane = :lane
)
UPDATE fairlane.purchases p
SET status = v.status,
    reason = v.reason,
    rev = p.rev + 1,
    decided_at = v.decided_at,
    due_at = CASE WHEN v.status = 'reserved' THEN v.decided_at END,
    expires_at = CASE WHEN v.status = 'reserved' THEN v.decided_at + make_interval(secs => v.hold_seconds) END,
    finished_at = v.finished_at,
    payment_token = CASE WHEN v.status IN ('reserved', 'waitlisted', 'needs_review') THEN p.payment_token END
FROM unnest(CAST(:ids AS uuid[]), CAST(:were AS text[]), CAST(:statuses AS text[]), CAST(:reasons AS text[]),
        CAST(:holds AS int[]), CAST(:decided AS timestamptz[]), CAST(:finished AS timestamptz[]))
    AS v(id, was, status, reason, hold_seconds, decided_at, finished_at)
WHERE p.id = ANY(CAST(:ids AS uuid[])) AND p.id = v.id AND p.status = v.was
RETURNING encode(uuid_send(p.id), 'hex') AS id
""")
"""The verdicts of a batch, and how far its lane was decided. Guarded by the state that each purchase was read in; the
token goes with the last state that needs it. Only ids come back: the rows were read under their locks, and what becomes
of them is in the parameters. To read them again would be a tenth of a lane's time."""

TAKE_STOCK = text(f"""
UPDATE fairlane.items i
SET available = i.available - t.taken, unpaid = i.unpaid + t.taken, rev = i.rev + 1
FROM unnest(CAST(:skus AS text[]), CAST(:taken AS int[])) AS t(sku, taken)
WHERE i.sku = ANY(CAST(:skus AS text[])) AND i.sku = t.sku
RETURNING {doors.COLUMNS}
""")
"""Moves stock from available to held, by exactly what the batch reserved. The CHECK refuses wrong arithmetic."""
