"""What the audit asks Postgres. Each statement is one snapshot; each check returns (subject, detail) of what is wrong.

Nothing here holds a snapshot for long. What can be said of one purchase is asked for a range of them at a time
(`:after`, `:upto`, by `seq`). What compares purchases with each other first narrows them down, or groups them, and its
windows open at a fixed end: a frame whose start moves costs the square of its rows.

Where one thing must have come before another, `:apart` seconds lie between them: no transaction of ours lives that
long. What was accepted so much earlier was committed, and a change of an item so long ago was seen.

*Given* below means: got stock, for good or for a while; it then has `expires_at`, and keeps it. A purchase that was set
aside before its decision never did, also when an operator declined it later and it was "decided" then.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import TextClause, text

_FINAL = "('confirmed', 'declined', 'sold_out', 'limit_reached', 'cancelled', 'expired')"
_HOLDING = "('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')"
_GIVEN = "(p.decided_at IS NOT NULL AND p.expires_at IS NOT NULL AND p.status NOT IN ('queued', 'waitlisted'))"
_WAITING = "p.status IN ('queued', 'waitlisted')"
_SLOW = f"""(({_WAITING} OR {_GIVEN} OR p.status IN ('sold_out', 'limit_reached'))
    AND coalesce(p.decided_at, now()) > p.accepted_at + interval '10 seconds')"""

END = text("SELECT coalesce(max(seq), 0) AS seq FROM fairlane.purchases")
"""The newest purchase. The audit stops at it: in a sale that goes on, there is always a newer one."""

RANGE = text("""
SELECT max(seq) AS upto FROM (
    SELECT seq FROM fairlane.purchases WHERE seq > :after AND seq <= :end ORDER BY seq LIMIT :batch
) range
""")
"""Where the next range of purchases ends; NULL when there is none."""

ITEMS = text(f"""
WITH batch AS (
    SELECT i.* FROM fairlane.items i WHERE i.sku > CAST(:after AS text) COLLATE "C" ORDER BY i.sku LIMIT :batch
)
SELECT b.sku, b.lane, b.stock, b.available, b.unpaid,
       coalesce(sum(p.quantity) FILTER (WHERE p.status <> 'confirmed'), 0) AS held,
       coalesce(sum(p.quantity) FILTER (WHERE p.status = 'confirmed'), 0) AS sold
FROM batch b LEFT JOIN fairlane.purchases p
    ON p.item = b.sku AND p.decided_at IS NOT NULL AND p.status IN {_HOLDING}
GROUP BY b.sku, b.lane, b.stock, b.available, b.unpaid
ORDER BY b.sku
""")
"""Items after one, with the units their purchases hold and bought, at one moment."""

COUNTS = text("SELECT status, count(*) AS purchases FROM fairlane.purchases GROUP BY status ORDER BY status")

CHARGED = text("""
SELECT p.id, p.seq, p.rev, p.status, p.charge_id FROM fairlane.purchases p
WHERE p.seq > :after AND p.seq <= :end AND (p.attempt > 0 OR p.expires_at IS NOT NULL) ORDER BY p.seq LIMIT :batch
""")
"""Purchases that were ever claimed for charging, a batch after another; and those that could have been, as they had
stock: a Postgres that came back without its last commits does not know of a claim that was made."""

CHARGED_BY_ID = text("""
SELECT p.id, p.seq, p.rev, p.status, p.charge_id FROM fairlane.purchases p WHERE p.id = ANY(CAST(:ids AS uuid[]))
""")

WINNERS_LOST = text("""
SELECT p.id FROM fairlane.purchases p
WHERE p.expires_at IS NOT NULL AND (p.status = 'expired' OR (p.status = 'declined' AND NOT EXISTS (
    SELECT FROM fairlane.charge_attempts a
    WHERE a.purchase_id = p.id AND a.outcome = 'declined' AND a.reason IS DISTINCT FROM 'declined_by_operator')))
ORDER BY p.seq
""")
"""Had stock and lost it without the provider's word: the hold ran out unpaid, no call ever reached the provider, or an
operator gave it up. Judged by the attempts, not by the purchase's reason. Cancelled is the buyer's own doing."""

_LANE = text("""
SELECT p.id AS subject, format('is in lane %s, its item %s in lane %s', p.lane, p.item, i.lane) AS detail
FROM fairlane.purchases p JOIN fairlane.items i ON i.sku = p.item
WHERE p.seq > :after AND p.seq <= :upto AND p.lane <> i.lane ORDER BY p.seq
""")

_TIMES = text(f"""
SELECT p.id AS subject, format('is %s %s', p.status, w.wrong) AS detail
FROM fairlane.purchases p
CROSS JOIN LATERAL (SELECT
    p.status IN {_FINAL} AS final,
    {_WAITING} AS waiting,
    p.attempt > 0 AS claimed,
    -- In review after a call. Set aside by its decision, it was never called.
    p.status IN ('charging', 'in_doubt') OR (p.status = 'needs_review' AND p.attempt > 0) AS called
) s
CROSS JOIN LATERAL (SELECT concat_ws(', ',
    CASE WHEN s.final AND p.finished_at IS NULL THEN 'without finished_at' END,
    CASE WHEN NOT s.final AND p.finished_at IS NOT NULL THEN 'with finished_at' END,
    CASE WHEN s.final AND p.payment_token IS NOT NULL THEN 'with its payment token' END,
    CASE WHEN NOT s.final AND p.payment_token IS NULL THEN 'without its payment token' END,
    CASE WHEN p.decided_at IS NULL AND (s.claimed OR p.status IN
        ('reserved', 'charging', 'in_doubt', 'confirmed', 'declined', 'sold_out', 'limit_reached'))
        THEN 'without decided_at' END,
    CASE WHEN s.waiting AND p.decided_at IS NOT NULL THEN 'with decided_at' END,
    -- Declined without a claim: by an operator, and it never had stock.
    CASE WHEN p.expires_at IS NULL AND (s.claimed OR p.status = 'reserved' OR (
        p.decided_at IS NOT NULL AND NOT s.waiting AND p.status NOT IN ('sold_out', 'limit_reached', 'declined')))
        THEN 'without expires_at' END,
    CASE WHEN p.expires_at IS NOT NULL AND (s.waiting OR p.status IN ('sold_out', 'limit_reached'))
        THEN 'with expires_at' END,
    CASE WHEN p.status = 'reserved' AND p.due_at IS NULL THEN 'without due_at' END,
    CASE WHEN p.status <> 'reserved' AND p.due_at IS NOT NULL THEN 'with due_at' END,
    CASE WHEN s.called AND p.call_deadline IS NULL THEN 'without call_deadline' END,
    CASE WHEN NOT s.called AND p.call_deadline IS NOT NULL THEN 'with call_deadline' END,
    CASE WHEN p.status = 'in_doubt' AND p.doubt_since IS NULL THEN 'without doubt_since' END,
    CASE WHEN p.status <> 'in_doubt' AND p.doubt_since IS NOT NULL THEN 'with doubt_since' END,
    CASE WHEN p.status = 'in_doubt' AND p.ask_at IS NULL THEN 'without ask_at' END,
    CASE WHEN p.status <> 'in_doubt' AND p.ask_at IS NOT NULL THEN 'with ask_at' END,
    -- A clock may be set back by a little (a step of NTP, a failover): a second is no finding.
    CASE WHEN p.decided_at < p.accepted_at - interval '1 second' THEN 'decided before it was accepted' END,
    CASE WHEN p.finished_at < greatest(p.accepted_at, p.decided_at) - interval '1 second'
        THEN 'finished before it was accepted and decided' END,
    CASE WHEN p.expires_at <= p.decided_at THEN 'with a hold that ended before it began' END,
    CASE WHEN p.doubt_since < p.decided_at - interval '1 second' THEN 'in doubt before it was decided' END
) AS wrong) w
WHERE p.seq > :after AND p.seq <= :upto AND w.wrong <> ''
ORDER BY p.seq
""")
"""Each state has the times it needs and none of those it must not have, as the statements that move purchases set and
erase them. Recomputed here, as a CHECK may have been dropped, or added without looking at the rows that were there."""

_TIMES_OF_ATTEMPTS = text("""
SELECT a.purchase_id AS subject,
       format('attempt %s is %s %s', a.attempt, coalesce(a.outcome, 'without an outcome'), w.wrong) AS detail
FROM fairlane.purchases p JOIN fairlane.charge_attempts a ON a.purchase_id = p.id
CROSS JOIN LATERAL (SELECT concat_ws(', ',
    CASE WHEN a.outcome IS NOT NULL AND a.recorded_at IS NULL THEN 'without recorded_at' END,
    CASE WHEN a.outcome IS NULL AND a.recorded_at IS NOT NULL THEN 'with recorded_at' END,
    CASE WHEN a.recorded_at < a.claimed_at - interval '1 second' THEN 'recorded before it was claimed' END,
    CASE WHEN a.outcome = 'not_charged' AND a.recheck_at IS NULL AND a.rechecks < 3 THEN 'without recheck_at' END,
    CASE WHEN a.outcome IS DISTINCT FROM 'not_charged' AND a.recheck_at IS NOT NULL THEN 'with recheck_at' END
) AS wrong) w
WHERE p.seq > :after AND p.seq <= :upto AND w.wrong <> ''
ORDER BY p.seq, a.attempt
""")

_ATTEMPTS = text("""
SELECT p.id AS subject,
       format('is %s with %s successful attempts (%s)', p.status, count(a.charge_id), string_agg(a.charge_id, ', '))
           AS detail
FROM fairlane.purchases p
LEFT JOIN fairlane.charge_attempts a ON a.purchase_id = p.id AND a.outcome = 'confirmed'
WHERE p.seq > :after AND p.seq <= :upto AND p.attempt > 0
GROUP BY p.id
HAVING (p.status = 'confirmed' AND (count(a.charge_id) <> 1 OR max(a.charge_id) <> p.charge_id))
    OR (p.status <> 'confirmed' AND count(a.charge_id) > 0)
ORDER BY p.seq
""")
"""Confirmed by anything but one attempt with the same charge, or paid for by an attempt and not confirmed."""

_LIMIT = text(f"""
SELECT p.item AS subject,
       format('customer %s of %s has %s, the limit is %s', p.customer, p.client_id, sum(p.quantity), i.per_customer)
           AS detail
FROM fairlane.purchases p JOIN fairlane.items i ON i.sku = p.item
WHERE i.per_customer IS NOT NULL AND p.decided_at IS NOT NULL AND p.status IN {_HOLDING}
GROUP BY p.item, p.client_id, p.customer, i.per_customer, i.created_at, i.updated_at
HAVING sum(p.quantity) > i.per_customer
   AND (i.updated_at = i.created_at OR max(p.decided_at) > i.updated_at + make_interval(secs => :apart))
ORDER BY p.item, p.client_id, p.customer
""")
"""A limit lowered later is no fault: the last purchase must have been given its stock under the present one."""

_ORDER = text(f"""
WITH slow AS MATERIALIZED (
    SELECT DISTINCT p.item FROM fairlane.purchases p WHERE {_SLOW}
), line AS (
    SELECT p.id, p.item, p.seq, p.status, p.accepted_at, p.decided_at, {_GIVEN} AS given, {_SLOW} AS slow
    FROM fairlane.purchases p WHERE p.item IN (SELECT item FROM slow) AND ({_GIVEN} OR {_SLOW})
), seen AS (
    SELECT l.*,
        min(l.decided_at) FILTER (WHERE l.given) OVER (
            PARTITION BY l.item, l.accepted_at ORDER BY l.seq DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS behind_in_commit,
        min(l.decided_at) FILTER (WHERE l.given) OVER (
            PARTITION BY l.item ORDER BY l.accepted_at DESC
            RANGE BETWEEN UNBOUNDED PRECEDING AND make_interval(secs => :apart) PRECEDING
        ) AS behind_in_time
    FROM line l
)
SELECT s.id AS subject,
       format('seq %s of %s is %s, decided %s; one behind it was given stock at %s',
              s.seq, s.item, s.status, coalesce(CAST(s.decided_at AS text), 'never'),
              least(behind_in_commit, behind_in_time))
           AS detail
FROM seen s
WHERE s.slow AND least(s.behind_in_commit, s.behind_in_time) + interval '10 seconds' < coalesce(s.decided_at, now())
ORDER BY s.seq
""")
"""Overtaken: still waiting, or decided later, while one that surely came later was given stock. By 10 seconds at least:
a lane with work is decided again well within them, whatever dies. That excuses a clock that was set back by a little,
and two API processes whose commits began in the same microsecond and look like one. Whoever was decided sooner was not
overtaken by as much, and is not looked at."""

_REFUSED = text(f"""
WITH decisions AS (
    SELECT p.item, p.decided_at,
        max(p.quantity) FILTER (WHERE {_GIVEN}) AS given,
        min(p.quantity) FILTER (WHERE p.status = 'sold_out') AS refused
    FROM fairlane.purchases p WHERE p.decided_at IS NOT NULL GROUP BY p.item, p.decided_at
), followed AS (
    SELECT d.*, max(d.given) OVER (
        PARTITION BY d.item ORDER BY d.decided_at DESC
        RANGE BETWEEN UNBOUNDED PRECEDING AND interval '1 second' PRECEDING
    ) AS given_later
    FROM decisions d
), doubtful AS MATERIALIZED (
    SELECT f.item, f.decided_at, f.given_later, i.waitlist
    FROM followed f JOIN fairlane.items i ON i.sku = f.item
    WHERE f.refused <= greatest(f.given, CASE WHEN i.waitlist THEN f.given_later END)
      AND (i.updated_at = i.created_at OR i.updated_at + make_interval(secs => :apart) < f.decided_at)
), seen AS (
    SELECT p.id, p.item, p.seq, p.status, p.quantity, d.given_later, d.waitlist,
        max(p.quantity) FILTER (WHERE {_GIVEN}) OVER (
            PARTITION BY p.item, p.decided_at ORDER BY p.seq DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS given_behind
    FROM doubtful d JOIN fairlane.purchases p ON p.item = d.item AND p.decided_at = d.decided_at
)
SELECT s.id AS subject,
       format('seq %s of %s was refused %s as sold out; %s', s.seq, s.item, s.quantity,
              CASE WHEN s.given_behind >= s.quantity THEN 'one behind it got as many in the same decision'
                   ELSE 'as many were given later' END) AS detail
FROM seen s
WHERE s.status = 'sold_out'
  AND (s.given_behind >= s.quantity OR (s.given_later >= s.quantity AND s.waitlist))
ORDER BY s.seq
""")
"""Refused as sold out although as many units were given to one behind, or a second later. Only while the item's terms
were the present ones: after a restock both are right."""

BY_RANGE: Sequence[tuple[str, TextClause]] = (
    ("purchase lane", _LANE),
    ("times", _TIMES),
    ("times", _TIMES_OF_ATTEMPTS),
    ("attempts", _ATTEMPTS),
)
"""The checks of one purchase by itself, asked range by range."""

BY_ITEM: Sequence[tuple[str, TextClause]] = (
    ("customer limit", _LIMIT),
    ("order", _ORDER),
    ("refused too early", _REFUSED),
)
"""The checks that compare the purchases of an item with each other."""
