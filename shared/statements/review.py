"""What an operator settles: purchases of which only a person can say what happened."""

from __future__ import annotations

from sqlalchemy import text

from shared.purchases import COLUMNS

IN_REVIEW = text(f"""
SELECT {COLUMNS}, p.fence, p.attempt FROM fairlane.purchases p
WHERE p.status = 'needs_review' AND (CAST(:id AS uuid) IS NULL OR p.id = CAST(:id AS uuid))
ORDER BY p.seq
""")
"""All of them, or one, oldest first. Without a fence it was set aside before its decision, and holds nothing."""

DECLINE_UNDECIDED = text(f"""
UPDATE fairlane.purchases p
SET status = 'declined', reason = :reason, rev = p.rev + 1, payment_token = NULL,
    decided_at = clock_timestamp(), finished_at = clock_timestamp()
WHERE p.id = CAST(:id AS uuid) AND p.status = 'needs_review' AND p.fence IS NULL
RETURNING {COLUMNS}
""")
"""One that was set aside before its decision: nothing was held for it, nothing could have been charged."""
