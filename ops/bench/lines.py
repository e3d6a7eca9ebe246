"""Items and lines of purchases put straight into Fairlane's tables, and lanes that are let loose on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ops.bench.samples import Sample
from ops.bench.site import Site, SiteError
from ops.bench.usage import Used
from shared.routing import lane_of

_ITEMS = b"""
INSERT INTO fairlane.items (sku, lane, name, price, currency, stock, available, hold_seconds)
SELECT i.sku, i.lane, i.sku, 2500, 'EUR', %(stock)s, %(stock)s, 900
FROM unnest(%(skus)s::text[], %(lanes)s::smallint[]) AS i(sku, lane)
"""
# In the order of the generated numbers, so that `seq` follows it as it would follow arrival.
_LINE = b"""
WITH line AS (
    INSERT INTO fairlane.purchases
        (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency)
    SELECT uuidv7(), nextval('fairlane.purchase_seq'), 'bench', gen_random_uuid()::text, i.sku, i.lane, 1, 'c-' || n,
           'tok_visa', 2500, 'EUR'
    FROM (SELECT n, (%(skus)s::text[])[1 + (n - 1) %% cardinality(%(skus)s::text[])] AS sku
          FROM generate_series(1, %(purchases)s) AS n) AS numbered
    JOIN fairlane.items i USING (sku)
    ORDER BY n
    RETURNING client_id, idempotency_key, id
)
INSERT INTO fairlane.purchase_keys (client_id, idempotency_key, purchase_id, fingerprint)
SELECT client_id, idempotency_key, id, sha256(id::text::bytea) FROM line
"""
# As a decision would have left them: stock taken, held for a quarter of an hour, due at once.
_HOLD = b"""
WITH held AS (
    UPDATE fairlane.purchases SET status = 'reserved', rev = rev + 1, decided_at = now(), due_at = now(),
        expires_at = now() + interval '15 minutes'
    WHERE item = %(sku)s AND status = 'queued' RETURNING quantity
)
UPDATE fairlane.items SET available = available - taken, unpaid = unpaid + taken, rev = rev + 1
FROM (SELECT sum(quantity) AS taken FROM held) AS sums WHERE sku = %(sku)s
"""
# Each state by the partial index that has it: this is asked while others are measured.
_OPEN = """
SELECT (EXISTS (SELECT FROM fairlane.purchases WHERE status = 'queued')
    OR EXISTS (SELECT FROM fairlane.purchases WHERE status = 'waitlisted')
    OR EXISTS (SELECT FROM fairlane.purchases WHERE status = 'reserved')
    OR EXISTS (SELECT FROM fairlane.purchases WHERE status = 'charging')
    OR EXISTS (SELECT FROM fairlane.purchases WHERE status = 'in_doubt'))::int
"""
#: Seconds between two such questions: a hundredth of what a round takes.
_SELDOM = 0.05
_PACE = b"""
SELECT count(*), count(*) FILTER (WHERE decided_at > began), extract(epoch FROM max(decided_at) - min(began))
FROM fairlane.purchases, (SELECT min(decided_at) AS began FROM fairlane.purchases WHERE seq BETWEEN %s AND %s) AS first
WHERE seq BETWEEN %s AND %s
"""


def create_items(site: Site, skus: Sequence[str], stock: int) -> None:
    """Items on sale, of a price, with this stock each."""
    lanes = [lane_of(sku, site.settings.lanes) for sku in skus]
    site.connection.execute(_ITEMS, {"skus": list(skus), "lanes": lanes, "stock": stock})


def queue_purchases(site: Site, skus: Sequence[str], purchases: int) -> None:
    """So many purchases of one unit, the items in turn, all queued. Nobody is called."""
    site.connection.execute(_LINE, {"skus": list(skus), "purchases": purchases})


def hold_purchases(site: Site, sku: str, purchases: int) -> None:
    """So many purchases of one unit that were decided and are due to be charged. Nobody is called."""
    queue_purchases(site, [sku], purchases)
    site.connection.execute(_HOLD, {"sku": sku})


def wait_until_settled(site: Site) -> None:
    """Wait until every purchase has come to its end."""
    site.wait(lambda: site.number(_OPEN) == 0, "the end of all purchases", look_every=_SELDOM)


def lanes_of(site: Site, skus: Sequence[str]) -> list[int]:
    """The lanes that decide these items."""
    return sorted({lane_of(sku, site.settings.lanes) for sku in skus})


def warm_up(site: Site) -> None:
    """Have every lane decided, so that each worker process has its connections and its statements prepared."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < site.settings.lanes:
        sku = f"warm-{number}"
        found.setdefault(lane_of(sku, site.settings.lanes), sku)
        number += 1
    skus = list(found.values())
    create_items(site, skus, 1_000_000)
    # psycopg prepares a statement when it is used for the sixth time, and each process comes to several lanes.
    for _ in range(5):
        queue_purchases(site, skus, 4 * len(skus))
        decide(site, skus, 4 * len(skus))


def decide(site: Site, skus: Sequence[str], purchases: int) -> Sample:
    """Call the lanes of these items, of which so many purchases wait, and let the workers come to the last."""
    lanes = lanes_of(site, skus)
    last_of = {
        lane: site.number("SELECT max(seq) FROM fairlane.purchases WHERE lane = %s AND status = 'queued'", lane)
        for lane in lanes
    }
    usage = site.usage()
    began = time.monotonic()
    site.call(lanes)
    left = dict(last_of)

    def done() -> bool:
        rows = site.connection.execute("SELECT lane, decided_through FROM fairlane.lanes").fetchall()
        for lane, through in rows:
            if lane in left and through >= left[lane]:
                del left[lane]
        return not left

    site.wait(done, f"{purchases:,} decisions")
    seconds = time.monotonic() - began
    used = usage.read()
    return Sample(purchases, seconds, cpu=used.cpu, memory=used.memory)


def decide_alone(site: Site, purchases: int, work: Callable[[], int]) -> Sample:
    """Have this process settle so many purchases by `work`, which returns how many it settled.

    Raises SiteError if those were not all: a comparison with half the work is none.
    """
    usage = site.usage()
    mine = time.process_time()
    began = time.monotonic()
    settled = work()
    seconds = time.monotonic() - began
    used = usage.read()
    if settled != purchases:
        raise SiteError(f"{settled:,} of {purchases:,} purchases were settled")
    return Sample(purchases, seconds, cpu={"loop": time.process_time() - mine, **used.cpu})


def decide_some(site: Site, sku: str, purchases: int) -> Sample:
    """Have about so many of a longer line decided, then stop whoever decides by taking the lane."""
    lane = lane_of(sku, site.settings.lanes)
    first = site.number("SELECT min(seq) FROM fairlane.purchases WHERE lane = %s AND status = 'queued'", lane)
    usage = site.usage()
    site.call([lane])
    site.wait(lambda: decided_through(site, lane) >= first + purchases, f"{purchases:,} decisions")
    # Whoever decides finds the lane taken after their batch, and goes; nobody calls them again.
    site.hold_lane(lane)
    used = usage.read()
    return _pace(site, first, decided_through(site, lane), used)


def decide_whole(site: Site, sku: str, purchases: int) -> Sample:
    """The same for a line that is decided to its end."""
    lane = lane_of(sku, site.settings.lanes)
    first = site.number("SELECT min(seq) FROM fairlane.purchases WHERE lane = %s AND status = 'queued'", lane)
    usage = site.usage()
    site.call([lane])
    site.wait(lambda: decided_through(site, lane) >= first + purchases - 1, f"{purchases:,} decisions")
    return _pace(site, first, decided_through(site, lane), usage.read())


def decided_through(site: Site, lane: int) -> int:
    """The lane's watermark: every purchase up to this `seq` was decided."""
    return site.number("SELECT decided_through FROM fairlane.lanes WHERE lane = %s", lane)


def _pace(site: Site, first: int, last: int, used: Used) -> Sample:
    """From the first batch to the last: what it takes until a worker has heard the call has nothing to do with a line's
    length, and would weigh more in a short one."""
    row = site.connection.execute(_PACE, [first, last] * 2).fetchone()
    count, after_the_first, seconds = row or (0, 0, 0.0)
    return Sample(count, float(seconds) * count / after_the_first, cpu=used.cpu, memory=used.memory)
