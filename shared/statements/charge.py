"""Charging: claim what is due with its intent committed, and record what came of it."""

from __future__ import annotations

from sqlalchemy import text

from shared import doors
from shared.purchases import COLUMNS

CLAIM = text(f"""
WITH due AS (
    SELECT id FROM fairlane.purchases
    WHERE status = 'reserved' AND due_at <= now() AND expires_at > now()
    ORDER BY due_at, seq LIMIT :slots
    FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE fairlane.purchases p
    SET status = 'charging', rev = p.rev + 1, attempt = p.attempt + 1, fence = nextval('fairlane.fence_seq'),
        due_at = NULL, call_deadline = clock_timestamp() + make_interval(secs => :overdue_after)
    WHERE p.id = ANY(ARRAY(SELECT id FROM due)) AND CASE p.status WHEN 'reserved' THEN true ELSE false END
    RETURNING {COLUMNS}, p.id AS purchase_id, p.payment_token, p.attempt, p.fence, p.call_deadline
), intents AS (
    INSERT INTO fairlane.charge_attempts (purchase_id, attempt, fence, worker, claimed_at, call_deadline)
    SELECT purchase_id, attempt, fence, :worker, clock_timestamp(), call_deadline FROM claimed
)
SELECT * FROM claimed ORDER BY seq
""")
"""Promise: intent before call. Moves due holds to `charging` under a new fence and writes the attempt, all in one
commit, before a byte is sent. SKIP LOCKED: several workers share the line without waiting for each other."""

LOCK_PURCHASES = text("""
SELECT encode(uuid_send(id), 'hex') AS id, status FROM fairlane.purchases WHERE id = ANY(CAST(:ids AS uuid[]))
ORDER BY seq + 0 FOR NO KEY UPDATE SKIP LOCKED
""")
"""Promise: nobody who keeps one purchase locked delays the outcomes of others. Those passed over are brought again."""

CLAIM_AGAIN = text("""
WITH claimed AS (
    UPDATE fairlane.purchases p
    SET status = 'charging', rev = p.rev + 1, attempt = p.attempt + 1, fence = nextval('fairlane.fence_seq'),
        due_at = NULL, call_deadline = clock_timestamp()
    FROM unnest(CAST(:ids AS uuid[]), CAST(:workers AS text[])) AS o(id, worker)
    WHERE p.id = ANY(CAST(:ids AS uuid[])) AND p.id = o.id AND CASE p.status WHEN 'reserved' THEN true ELSE false END
    RETURNING p.id, p.attempt, p.fence, p.call_deadline, o.worker
), intents AS (
    INSERT INTO fairlane.charge_attempts (purchase_id, attempt, fence, worker, claimed_at, call_deadline)
    SELECT id, attempt, fence, worker, call_deadline, call_deadline FROM claimed
)
SELECT id, fence FROM claimed
""")
"""Promise: a charge that is known is not made again. Postgres believes that purchase to be unpaid, for the
intent was forgotten (a restore), or the provider said too early that it knew of no charge. The intent is written anew,
and the outcome counts under its fence."""

EXISTING = text("""
SELECT id FROM fairlane.purchases WHERE id = ANY(CAST(:ids AS uuid[]))
""")
"""Of the purchases that LOCK_PURCHASES did not return, those that somebody has locked; the others do not exist."""

RECORD = text(f"""
UPDATE fairlane.purchases p
SET status = o.status,
    reason = o.reason,
    rev = p.rev + 1,
    charge_id = CASE WHEN o.status IN ('confirmed', 'declined') THEN o.charge_id END,
    due_at = CASE WHEN o.status = 'reserved' THEN clock_timestamp() + make_interval(secs => o.retry_after) END,
    -- One more attempt is owed to a purchase that was never charged, even if its hold would have ended meanwhile.
    expires_at = CASE WHEN p.status = 'in_doubt' AND o.status = 'reserved'
        THEN greatest(p.expires_at, clock_timestamp() + interval '1 minute') ELSE p.expires_at END,
    call_deadline = CASE WHEN o.status IN ('in_doubt', 'needs_review') THEN p.call_deadline END,
    doubt_since = CASE WHEN o.status = 'in_doubt' THEN clock_timestamp() END,
    ask_at = CASE WHEN o.status = 'in_doubt' THEN clock_timestamp() END,
    finished_at = CASE WHEN o.status IN ('confirmed', 'declined') THEN clock_timestamp() END,
    payment_token = CASE WHEN o.status NOT IN ('confirmed', 'declined') THEN p.payment_token END
FROM json_to_recordset(CAST(:results AS json))
    AS o(id uuid, fence bigint, status text, reason text, charge_id text, retry_after float8)
WHERE p.id = ANY(CAST(:ids AS uuid[])) AND p.id = o.id AND p.fence = o.fence
  AND CASE p.status
          WHEN 'charging' THEN o.status <> 'needs_review'
          WHEN 'in_doubt' THEN o.status <> 'in_doubt'
          WHEN 'needs_review' THEN o.status IN ('confirmed', 'declined')
          ELSE false END
RETURNING {COLUMNS}, p.fence
""")
"""Promise: an outcome counts only with the row's fence. Also from `in_doubt` and `needs_review`: a late answer is still
the answer. Stock moves only for the rows returned here. `results` is a JSON array, and the same for RECORD_ATTEMPTS:
one text is packed in a fraction of the time that six arrays are."""

STANDING = text(f"""
SELECT {COLUMNS}, p.fence, o.fence AS told_fence, a.outcome AS attempt_outcome
FROM unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[])) AS o(id, fence)
CROSS JOIN LATERAL (SELECT p.* FROM fairlane.purchases p WHERE p.id = o.id LIMIT 1) p
LEFT JOIN LATERAL (SELECT a.outcome, a.purchase_id FROM fairlane.charge_attempts a WHERE a.fence = o.fence LIMIT 1) a
    ON a.purchase_id = o.id
""")
"""Where purchases and attempts stand whose outcome RECORD did not take: the same outcome again is success, another one
an alert."""

_LANES_WITH_WAITLISTS = """
SELECT DISTINCT i.lane FROM fairlane.items i CROSS JOIN LATERAL (
    SELECT FROM fairlane.purchases p
    WHERE p.lane = i.lane AND p.item = i.sku AND p.status = 'waitlisted' LIMIT 1
) head
WHERE i.sku = ANY(CAST(:skus AS text[]))
"""

LANES_WITH_WAITLISTS = text(_LANES_WITH_WAITLISTS)
"""Which lanes to call after holds ended. A statement after SETTLE_STOCK: that one may have waited for a decision that
just put somebody on the waitlist, whom its own snapshot would not show."""

RECORD_ATTEMPTS = text(f"""
WITH recorded AS (
    UPDATE fairlane.charge_attempts a
    SET outcome = o.outcome, reason = o.reason, charge_id = o.charge_id, recorded_at = clock_timestamp(),
        recheck_at = CASE WHEN o.outcome = 'not_charged' THEN clock_timestamp() + interval '5 minutes' END
    FROM json_to_recordset(CAST(:results AS json))
        AS o(id uuid, fence bigint, outcome text, reason text, charge_id text)
    WHERE a.purchase_id = ANY(CAST(:ids AS uuid[])) AND a.purchase_id = o.id AND a.fence = o.fence
      AND (a.outcome IS NULL OR a.outcome IN ('in_doubt', 'needs_review')
           OR (a.outcome = 'not_charged' AND o.outcome = 'confirmed'))
)
{_LANES_WITH_WAITLISTS}
""")
"""What came of each call, whether or not it still counted for the purchase: a known outcome is never thrown away. And,
to save a round trip, LANES_WITH_WAITLISTS."""

LOCK_ITEMS = text("""
SELECT sku FROM fairlane.items WHERE sku = ANY(CAST(:skus AS text[])) ORDER BY sku FOR NO KEY UPDATE
""")
"""Items before they are changed, in order: nobody waits for one of them while keeping one that comes later."""

SETTLE_STOCK = text(f"""
UPDATE fairlane.items i
SET available = i.available + s.returned, unpaid = i.unpaid - s.returned - s.sold, rev = i.rev + 1
FROM unnest(CAST(:skus AS text[]), CAST(:returned AS int[]), CAST(:sold AS int[])) AS s(sku, returned, sold)
WHERE i.sku = ANY(CAST(:skus AS text[])) AND i.sku = s.sku
RETURNING {doors.COLUMNS}
""")
"""Holds end: paid for, they become sold (no longer available, no longer unpaid); declined, they return."""
