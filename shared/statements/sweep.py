"""The sweep's questions: who has work and may have been forgotten. None scans; each is an index probe or two."""

from __future__ import annotations

from sqlalchemy import text

#: Advisory lock held by the one sweep that runs. The number is arbitrary but ours.
SWEEP_LOCK = 4_037_201_117

TRY_TO_BE_THE_ONE = text("SELECT pg_try_advisory_xact_lock(:lock)")
"""Promise: one sweep at a time, however many processes; freed with the transaction, so nobody has to be elected."""

LANES = text("""
SELECT l.lane, l.decided_through, head.seq AS head
FROM fairlane.lanes l LEFT JOIN LATERAL (
    SELECT p.seq FROM fairlane.purchases p
    WHERE p.lane BETWEEN l.lane AND l.lane AND p.status = 'queued' ORDER BY p.lane, p.seq LIMIT 1
) head ON true
ORDER BY l.lane
""")
"""Every lane with its watermark, and who is first in its queue (NULL: nobody). The lane is a range of one, as in
decide.READ_QUEUED."""

FREE_LANES = text("""
SELECT lane FROM fairlane.lanes WHERE lane = ANY(CAST(:lanes AS smallint[])) FOR SHARE SKIP LOCKED
""")
"""Those of these lanes that nobody is deciding now. Waits for nobody. A decider that meets this lock with its NOWAIT
leaves, and is called again in the next round."""

LANES_WITH_MOVING_WAITLISTS = text("""
WITH RECURSIVE heads AS (
    (SELECT lane, item, quantity FROM fairlane.purchases
     WHERE status = 'waitlisted' ORDER BY lane, item, seq LIMIT 1)
    UNION ALL
    SELECT next.lane, next.item, next.quantity FROM heads h CROSS JOIN LATERAL (
        SELECT lane, item, quantity FROM fairlane.purchases
        WHERE status = 'waitlisted' AND (lane, item) > (h.lane, h.item) ORDER BY lane, item, seq LIMIT 1
    ) next
)
SELECT DISTINCT h.lane
FROM heads h CROSS JOIN LATERAL (SELECT available, unpaid, waitlist FROM fairlane.items WHERE sku = h.item LIMIT 1) i
WHERE h.quantity <= i.available OR h.quantity > i.available + i.unpaid OR NOT i.waitlist
""")
"""The lanes where a waitlist can be settled now, as in `decide.WAITLISTS`, for all lanes at once."""

DUE = text("""
SELECT EXISTS (SELECT FROM fairlane.purchases WHERE status = 'charging' AND call_deadline < now()) AS claims_overdue,
    EXISTS (SELECT FROM fairlane.purchases
            WHERE CASE WHEN status = 'reserved' THEN true ELSE false END AND expires_at <= now()) AS holds_ended,
    (SELECT seq FROM fairlane.purchases WHERE status = 'waitlisted' ORDER BY lane, item, seq LIMIT 1)
        IS NOT NULL AS somebody_waits,
    EXISTS (SELECT FROM fairlane.purchases WHERE status = 'in_doubt' AND ask_at <= now())
        OR EXISTS (SELECT FROM fairlane.charge_attempts WHERE recheck_at <= now()) AS questions_due,
    (SELECT seq FROM fairlane.purchases
     WHERE status = 'reserved' AND due_at <= now() AND expires_at > now()
     ORDER BY due_at, seq LIMIT 1) AS first_due
""")
"""What there is to do, mostly nothing: a round with nothing to do asks no more than this. `first_due` is the hold that
is the first to be charged now, NULL if none is due; `questions_due`, whether the provider is to be asked anything."""
