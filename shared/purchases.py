"""A purchase as Postgres returns it and as Redis keeps it: one record, without the payment token."""

from __future__ import annotations

from datetime import UTC, datetime
from operator import itemgetter

import msgspec
from sqlalchemy import RowMapping

from shared.states import FINAL, WAITING, Status


def _moment(column: str) -> str:
    # The colons stand for themselves, not for a parameter.
    return f"""to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24\\:MI\\:SS.US"Z"')"""


COLUMNS = f"""
    encode(uuid_send(p.id), 'hex') AS id, p.client_id, p.seq, p.lane, p.rev, p.status, p.reason, p.item, p.quantity,
    p.customer, p.amount, p.currency, p.charge_id, {_moment("p.accepted_at")} AS accepted_at,
    {_moment("p.decided_at")} AS decided_at, {_moment("p.finished_at")} AS finished_at
"""
"""What a statement must return of `purchases p` to make a record: `id` and times as the record has them, since Postgres
makes such texts in a third of the time that Python does. The payment token is not among it. `workers.decide` takes the
columns of a line by their places."""

_in_order = itemgetter(
    "id", "client_id", "seq", "lane", "rev", "status", "item", "quantity", "customer", "amount", "currency",
    "accepted_at", "reason", "charge_id", "decided_at", "finished_at",
)  # fmt: skip
#: By their names: a look here takes a tenth of what `Status(name)` does.
STATUSES = {status.value: status for status in Status}


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
        purchase, client, seq, lane, rev, status, *others = _in_order(row)
        return cls(purchase, client, seq, lane, rev, STATUSES[status], *others)


def rfc3339(moment: datetime) -> str:
    """A moment in UTC with six fraction digits: `2026-01-31T09:00:00.000000Z`."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
