"""Accepting purchases: a batch in, one row per idempotency key, whoever else is inserting the same keys."""

from __future__ import annotations

from sqlalchemy import text

from shared.purchases import COLUMNS

INSERT = text(f"""
WITH arrived AS MATERIALIZED (
    SELECT nextval('fairlane.purchase_seq') AS seq, i.*, t.*
    FROM json_to_recordset(CAST(:orders AS json)) AS t(
        id uuid, client_id text, idempotency_key text, fingerprint bytea, item text, quantity int, customer text,
        payment_token text)
    CROSS JOIN LATERAL (SELECT lane, price, currency FROM fairlane.items WHERE sku = t.item LIMIT 1) i
), taken AS (
    INSERT INTO fairlane.purchase_keys (client_id, idempotency_key, purchase_id, fingerprint)
    SELECT a.client_id, a.idempotency_key, a.id, a.fingerprint
    FROM arrived a
    ORDER BY a.client_id COLLATE "C", a.idempotency_key COLLATE "C", a.seq
    ON CONFLICT DO NOTHING
    RETURNING purchase_id
)
INSERT INTO fairlane.purchases AS p
    (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency)
SELECT a.id, a.seq, a.client_id, a.idempotency_key, a.item, a.lane, a.quantity, a.customer, a.payment_token,
       a.price * a.quantity, a.currency
FROM taken JOIN arrived a ON a.id = taken.purchase_id
ORDER BY a.seq
RETURNING {COLUMNS}
""")
"""Promise: one key, one purchase. The orders are a JSON array, as one text is packed in a fraction of the time that
eight arrays are. `seq` is given in its order, which is the order of arrival; keys are taken sorted, as two batches with
the same keys in different orders would deadlock, and twins by arrival; who took the key gets the purchase; the price is
the item's at this moment; an item that does not exist gives no row."""

BY_KEY = text(f"""
SELECT k.idempotency_key, k.fingerprint, {COLUMNS}
FROM json_to_recordset(CAST(:keys AS json)) AS wanted(client_id text, idempotency_key text)
CROSS JOIN LATERAL (
    SELECT k.* FROM fairlane.purchase_keys k
    WHERE k.client_id = wanted.client_id AND k.idempotency_key = wanted.idempotency_key LIMIT 1
) k
CROSS JOIN LATERAL (SELECT p.* FROM fairlane.purchases p WHERE p.id = k.purchase_id LIMIT 1) p
""")
"""The purchases that own these idempotency keys, a JSON array of objects. A statement of its own after INSERT, so that
its snapshot sees what a concurrent twin committed while INSERT waited for it; and what is asked before any refusal."""

BY_ID = text(f"""
SELECT {COLUMNS}, l.decided_through
FROM fairlane.purchases p JOIN fairlane.lanes l ON l.lane = p.lane
WHERE p.id = ANY(CAST(:ids AS uuid[]))
""")
"""What a status read falls back on: the purchases themselves, with the watermark of their lanes."""
