"""A purchase as the API shows it: its JSON, its ETag, how long it may be kept and when to ask again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import msgspec
from starlette.responses import Response

from producers.json_answer import JsonAnswer
from producers.pace import Pace
from producers.reading import Reading
from shared.states import Status

#: Seconds between two polls at most. A client in a long line asks seldom, but half a minute is what a person waits
#: without a word.
_LONGEST_PAUSE: Final = 30
#: Seconds until a client should ask again, where its place in a line does not say.
_PAUSES: Final[Mapping[Status, int]] = {
    # While nobody knows its lane's pace: most purchases are decided and paid within a second.
    Status.QUEUED: 1,
    # It moves when a hold ahead falls back or is paid, mostly one payment later, at worst after a quarter of an hour.
    Status.WAITLISTED: 2,
    Status.RESERVED: 1,
    Status.CHARGING: 1,
    # The provider is asked now, and then ever more seldom, from seconds to minutes.
    Status.IN_DOUBT: 5,
    # An operator has to look.
    Status.NEEDS_REVIEW: _LONGEST_PAUSE,
}
#: A final state never changes. A day, since a client that still asks after one has lost what it knew.
_KEEP_FINAL: Final = "private, max-age=86400, immutable"
#: Kept only to be compared: asked for anew each time, and answered 304 while nothing changed.
_KEEP_CHANGING: Final = "private, no-cache"


class PurchaseAnswer(msgspec.Struct, frozen=True):
    """A purchase as the API shows it; times RFC 3339 in UTC, amounts in minor units, no payment token."""

    id: str
    status: str
    reason: str | None
    item: str
    quantity: int
    customer: str
    amount: int
    currency: str
    charge_id: str | None
    position: int | None
    accepted_at: str
    decided_at: str | None
    finished_at: str | None


_encode = msgspec.json.Encoder().encode


def etag_of(reading: Reading) -> str:
    """Another one whenever the purchase, or its place in the line, is another."""
    return f'"{reading.record.rev}-{reading.position or 0}"'


def estimated_seconds(reading: Reading, pace: Pace) -> int | None:
    """Seconds until a queued purchase is decided, from its lane's pace; None while that cannot be told."""
    record = reading.record
    if record.status is not Status.QUEUED:
        return None
    return pace.seconds(record.lane, record.seq, reading.decided_through, time.monotonic())


def ask_again(reading: Reading, pace: Pace) -> str:
    """Seconds after which a client should ask for a purchase that is not final: 1 to 30, by its place in the line."""
    seconds = estimated_seconds(reading, pace) or _PAUSES[reading.record.status]
    return str(min(seconds, _LONGEST_PAUSE))


def watching_headers(reading: Reading, pace: Pace, etag: str) -> dict[str, str]:
    """The headers of an answer to whoever watches a purchase, be it 200 or 304."""
    if reading.record.final:
        return {"ETag": etag, "Cache-Control": _KEEP_FINAL}
    return {"ETag": etag, "Cache-Control": _KEEP_CHANGING, "Retry-After": ask_again(reading, pace)}


def purchase_json(reading: Reading) -> bytes:
    """A purchase as its owner sees it."""
    record = reading.record
    return _encode(
        PurchaseAnswer(
            id=record.id,
            status=record.status.value,
            reason=record.reason,
            item=record.item,
            quantity=record.quantity,
            customer=record.customer,
            amount=record.amount,
            currency=record.currency,
            charge_id=record.charge_id,
            position=reading.position,
            accepted_at=record.accepted_at,
            decided_at=record.decided_at,
            finished_at=record.finished_at,
        )
    )


def shown(reading: Reading, headers: dict[str, str], *, status: int = 200) -> Response:
    """The answer that shows a purchase to its owner."""
    return JsonAnswer(purchase_json(reading), status, headers)
