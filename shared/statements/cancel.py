"""Cancelling: a purchase is called off by its owner, unless a charge may be under way."""

from __future__ import annotations

from sqlalchemy import text

from shared.purchases import COLUMNS

STANDING = text(f"""
SELECT {COLUMNS} FROM fairlane.purchases p
WHERE p.id = CAST(:id AS uuid) AND p.client_id = :client
""")
"""The purchase, if it is this client's. Asked first and without a lock, as whoever comes too late must not keep the
purchase from those who record its outcome: they pass over what is locked."""

LOCK = text(f"{STANDING.text.rstrip()} FOR NO KEY UPDATE")
"""Promise: a decision, a claim, the end of a hold and a cancellation take turns. Waits for whoever has the purchase,
and shows what they made of it. One purchase, and then its item: the one lock order."""

CANCEL = text(f"""
UPDATE fairlane.purchases p
SET status = 'cancelled', reason = 'cancelled_by_client', rev = p.rev + 1, due_at = NULL,
    finished_at = clock_timestamp(), payment_token = NULL
WHERE p.id = CAST(:id AS uuid) AND p.status IN ('queued', 'waitlisted', 'reserved')
AND NOT EXISTS (SELECT FROM fairlane.charge_attempts a WHERE a.purchase_id = p.id AND a.outcome = 'not_charged')
RETURNING {COLUMNS}
""")
"""Promise: what may have been sent is not called off. Guarded by the states it may leave, and by the attempts: one that
the provider did not know of was sent perhaps, and a charge that shows up late must find its purchase. No row then. What
a reserved one held goes back in the same transaction (charge.SETTLE_STOCK)."""
