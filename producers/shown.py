"""A purchase as the API shows it: its JSON, its ETag and when to ask again."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from producers.reading import Reading

#: Seconds a client should wait before it asks again: most purchases are final by then.
ASK_AGAIN = "1"


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


def shown(reading: Reading, headers: dict[str, str], *, status: int = 200) -> Response:
    """The answer that shows a purchase to its owner."""
    record = reading.record
    answer = PurchaseAnswer(
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
    return Response(_encode(answer), status_code=status, headers=headers, media_type="application/json")
