"""Every key Fairlane uses in Redis. Nothing here is the only copy of anything: all may be flushed at any time.

| key                           | type   | life          | written by                       | read by             |
|-------------------------------|--------|---------------|----------------------------------|---------------------|
| fairlane:purchase:<id>        | string | STATUS_TTL    | accept, decide, charge, read     | status reads        |
| fairlane:item:<sku>           | hash   | DOOR_TTL      | decide, charge, items, door      | admit               |
| fairlane:seen:<client>:<hash> | string | KEY_SEEN_TTL  | admit                            | admit               |
| fairlane:waiting:<sku>        | string | DOOR_TTL      | admit, decide, cancel            | admit               |
| fairlane:rate:<whose>         | string | until full    | admit                            | admit               |
| fairlane:called:<queue>       | string | CALLED_TTL    | whoever calls a lane or charges  | the same            |
| fairlane:decided:<lane>       | string | 30 s          | decide, sweep                    | status reads        |
| fairlane:lock:charge:<id>     | string | CHARGE_LOCK_TTL | charge, reconcile              | the same, operators |
| fairlane:metrics:locks        | hash   | no expiry     | charge, reconcile                | /metrics            |
| fairlane:metrics:locks:recent | hash   | 10 minutes    | charge, reconcile                | /metrics            |
| fairlane:metrics:locks:before | hash   | 10 minutes    | charge, reconcile                | /metrics            |
| fairlane:changed              | channel | none         | whoever writes a status          | who waits for one   |

Celery keeps its queues beside them under its own names (`lane.00` …, `charges`, `_kombu.*`, `unacked*`).
"""

from __future__ import annotations

from hashlib import blake2b

PREFIX = "fairlane:"

LOCK_TOTALS = f"{PREFIX}metrics:locks"
"""What was counted of the narrow locks: some forty fields, see `shared.lock_metrics`. A flush begins them again."""

LOCK_RECENT = f"{LOCK_TOTALS}:recent"
"""The same for the window of five minutes that is under way."""

LOCK_BEFORE = f"{LOCK_TOTALS}:before"
"""The same for the window before."""

CHANGED = f"{PREFIX}changed"
"""A channel, no key: the ids of purchases whose status is newer than the one before, separated by spaces. A message
that nobody heard is lost; whoever waits also looks by itself."""


def purchase(purchase_id: str) -> str:
    """The status of a purchase: `rev|written at, ms|JSON`."""
    return f"{PREFIX}purchase:{purchase_id}"


def item(sku: str) -> str:
    """The door record of an item: a hash, versioned by its field `rev`."""
    return f"{PREFIX}item:{sku}"


def waiting(sku: str) -> str:
    """How many units of an item were let in and are neither given nor refused stock yet. A change renews its life."""
    return f"{PREFIX}waiting:{sku}"


TOTAL_RATE = f"{PREFIX}rate:all"
"""The bucket of all requests to buy together."""


def client_rate(client: str) -> str:
    """The bucket of a client's requests to buy."""
    return f"{PREFIX}rate:client:{client}"


def customer_rate(client: str, customer: str) -> str:
    """The bucket of the requests to buy for one customer of a client. Hashed, as in `seen`."""
    digest = blake2b(customer.encode(), digest_size=16).hexdigest()
    return f"{PREFIX}rate:customer:{client}:{digest}"


def seen(client: str, idempotency_key: str) -> str:
    """The mark that a request with this idempotency key was let in: how many such requests stand on its units, and
    which these are; or `known`. See `shared/lua/admit.lua`.

    Hashed: keys are long and chosen by clients.
    """
    digest = blake2b(idempotency_key.encode(), digest_size=16).hexdigest()
    return f"{PREFIX}seen:{client}:{digest}"


def called(queue: str) -> str:
    """The mark that somebody was called to a queue, or that whoever is at it looks again; its value is their token."""
    return f"{PREFIX}called:{queue}"


def decided(lane: int) -> str:
    """The lane's watermark: purchases above it were not decided yet when it was written."""
    return f"{PREFIX}decided:{lane}"


def charge_lock(purchase_id: str) -> str:
    """The narrow lock around the payment call of one purchase; its value is the owner."""
    return f"{PREFIX}lock:charge:{purchase_id}"
