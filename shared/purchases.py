"""A purchase as Postgres returns it and as Redis keeps it: one record, without the payment token."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from sqlalchemy import RowMapping

from shared.states import FINAL, WAITING, Status

COLUMNS = """
    p.id, p.client_id, p.seq, p.lane, p.rev, p.status, p.reason, p.item, p.quantity, p.customer, p.amount, p.currency,
    p.charge_id, p.accepted_at, p.decided_at, p.finished_at
"""
"""What a statement must return of `purchases p` to make a record. The payment token is not among it."""


class PurchaseRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One purchase at one revision. `id` is 32 hex digits; times are RFC 3339; `amount` is in minor units."""

    id: str
    client: str
    seq: int
    lane: int
    rev: int
    status: Status
    item: str
    quantity: int
    customer: str
    amount: int
    currency: str
    accepted_at: str
    reason: str | None = None
    charge_id: str | None = None
    decided_at: str | None = None
    finished_at: str | None = None

    @property
    def final(self) -> bool:
        """Whether this record can never change again."""
        return self.status in FINAL

    @property
    def waiting(self) -> bool:
        """Whether it has a place in a line."""
        return self.status in WAITING

    @classmethod
    def from_row(cls, row: RowMapping) -> PurchaseRecord:
        """The record of a row with the columns `COLUMNS`."""
        return cls(
            id=row["id"].hex,
            client=row["client_id"],
            seq=row["seq"],
            lane=row["lane"],
            rev=row["rev"],
            status=Status(row["status"]),
            item=row["item"],
            quantity=row["quantity"],
            customer=row["customer"],
            amount=row["amount"],
            currency=row["currency"],
            accepted_at=rfc3339(row["accepted_at"]),
            reason=row["reason"],
            charge_id=row["charge_id"],
            decided_at=_rfc3339_or_none(row["decided_at"]),
            finished_at=_rfc3339_or_none(row["finished_at"]),
        )


def rfc3339(moment: datetime) -> str:
    """A moment in UTC with six fraction digits: `2026-01-31T09:00:00.000000Z`."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"


def _rfc3339_or_none(moment: datetime | None) -> str | None:
    return None if moment is None else rfc3339(moment)
