"""Recovery: what ran out of time, and what the provider must be asked about."""

from __future__ import annotations

from sqlalchemy import text

from shared.purchases import COLUMNS

MARK_IN_DOUBT = text(f"""
WITH overdue AS (
    SELECT id FROM fairlane.purchases
    WHERE status = 'charging' AND call_deadline < now()
    ORDER BY call_deadline LIMIT :batch
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE fairlane.purchases p
SET status = 'in_doubt', reason = 'no_outcome', rev = p.rev + 1,
    doubt_since = now(), ask_at = now()
WHERE p.id = ANY(ARRAY(SELECT id FROM overdue)) AND CASE p.status WHEN 'charging' THEN true ELSE false END
RETURNING {COLUMNS}
""")
"""Promise: in doubt is judged by Postgres alone. A claim whose deadline passed without an outcome; a lock in Redis,
there or not, changes nothing."""

EXPIRE = text(f"""
WITH expired AS (
    SELECT id FROM fairlane.purchases
    WHERE CASE WHEN status = 'reserved' THEN true ELSE false END AND expires_at <= now()
      AND (CAST(:item AS text) IS NULL OR item = CAST(:item AS text))
    ORDER BY expires_at LIMIT :batch
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE fairlane.purchases p
SET status = 'expired', reason = 'hold_ran_out', rev = p.rev + 1, due_at = NULL, finished_at = clock_timestamp(),
    payment_token = NULL
WHERE p.id = ANY(ARRAY(SELECT id FROM expired)) AND CASE p.status WHEN 'reserved' THEN true ELSE false END
RETURNING {COLUMNS}
""")
"""Holds that ran out, of one item or of all, before a charge was claimed or after it was provably not made. Their
stock goes back in the same transaction (charge.SETTLE_STOCK)."""

ITEMS_WITH_ENDED_HOLDS = text("""
SELECT DISTINCT item FROM fairlane.purchases
WHERE CASE WHEN status = 'reserved' THEN true ELSE false END AND expires_at <= now() ORDER BY item
""")
"""For ending holds item by item, when one of them keeps the others from it."""

CLAIM_QUESTIONS = text(f"""
WITH due AS (
    SELECT id FROM fairlane.purchases
    WHERE status = 'in_doubt' AND ask_at <= now()
    ORDER BY ask_at, seq LIMIT :batch
    FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE fairlane.purchases p SET ask_at = clock_timestamp() + make_interval(secs => :lease)
    WHERE p.id = ANY(ARRAY(SELECT id FROM due)) AND CASE p.status WHEN 'in_doubt' THEN true ELSE false END
    RETURNING {COLUMNS}, p.id AS purchase_id, p.attempt, p.fence,
        extract(epoch FROM clock_timestamp() - p.doubt_since) AS doubted,
        extract(epoch FROM p.call_deadline - clock_timestamp()) + :settle_window AS settles_in
)
SELECT c.*, (SELECT count(*) FROM fairlane.charge_attempts a
             WHERE a.purchase_id = c.purchase_id AND a.outcome = 'not_charged') AS not_charged
FROM claimed c ORDER BY seq
""")
"""The purchases to ask the provider about, leased so that nobody else asks meanwhile. `settles_in` is how many seconds
remain until "not found" means "never charged"; it is taken before the question is sent, so a question sent with 0 or
less was sent after the settle window."""

POSTPONE = text("""
WITH ours AS (
    SELECT p.id, q.pause
    FROM unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[]), CAST(:pauses AS float8[])) AS q(id, fence, pause)
    JOIN fairlane.purchases p ON p.id = q.id AND p.id = ANY(CAST(:ids AS uuid[])) AND p.fence = q.fence
        AND CASE p.status WHEN 'in_doubt' THEN true ELSE false END
    ORDER BY p.seq + 0 FOR NO KEY UPDATE OF p SKIP LOCKED
)
UPDATE fairlane.purchases p SET ask_at = clock_timestamp() + make_interval(secs => ours.pause)
FROM ours WHERE p.id = ours.id AND p.id = ANY(CAST(:ids AS uuid[]))
    AND CASE p.status WHEN 'in_doubt' THEN true ELSE false END
""")
"""No answer yet: when to ask again. What somebody has locked keeps its lease, and delays no other."""

CLAIM_RECHECKS = text("""
WITH due AS (
    SELECT purchase_id, attempt FROM fairlane.charge_attempts
    WHERE recheck_at <= now() ORDER BY recheck_at LIMIT :batch FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE fairlane.charge_attempts a
SET rechecks = a.rechecks + 1,
    recheck_at = CASE a.rechecks WHEN 0 THEN clock_timestamp() + interval '55 minutes'
                                 WHEN 1 THEN clock_timestamp() + interval '23 hours' END
FROM due WHERE a.purchase_id = due.purchase_id AND a.attempt = due.attempt
    AND a.purchase_id = ANY(ARRAY(SELECT purchase_id FROM due))
RETURNING a.purchase_id, a.attempt, a.fence,
    (SELECT p.charge_id FROM fairlane.purchases p WHERE p.id = a.purchase_id) AS charge_id
""")
"""Attempts that the provider said it never charged, to be asked about again 5 minutes, 1 hour and 24 hours later.
Written before the question: a question that is lost costs one of three, not the others."""
