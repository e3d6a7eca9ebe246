"""The decision itself: who gets stock. Pure: rows and stock in, verdicts out; no clock, no database.

The rules, for one item:

- The waitlisted stand before the newcomers; among each, the lower `seq` comes first.
- Whoever is asked for no more than what is available gets it, unless somebody before them still waits: a smaller
  request does not pass a bigger one.
- Whoever could still be served, should unpaid holds fall back, waits on the list; everyone else finds it sold out.
- Opening hours are judged by when a purchase was accepted, and the customer's limit by what this client's customer
  holds, sold or unpaid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from shared.states import Reason, Status


class Waiting(msgspec.Struct, frozen=True):
    """A purchase to decide: `status` is queued or waitlisted."""

    id: str
    seq: int
    item: str
    client: str
    customer: str
    quantity: int
    status: Status
    accepted_at: datetime

    @property
    def holder(self) -> tuple[str, str, str]:
        """Whose limit it counts against."""
        return (self.item, self.client, self.customer)


@dataclass(frozen=True, slots=True)
class Stock:
    """An item as its row lock shows it. `waitlist_end` is the `seq` of its last waitlisted purchase, if it has one."""

    sku: str
    available: int
    unpaid: int
    hold_seconds: int
    waitlist: bool = True
    per_customer: int | None = None
    opens_at: datetime | None = None
    closes_at: datetime | None = None
    waitlist_end: int | None = None

    def on_sale_at(self, moment: datetime) -> bool:
        """Whether the item was on sale then: from `opens_at` on, up to but not at `closes_at`."""
        opened = self.opens_at is None or moment >= self.opens_at
        closed = self.closes_at is not None and moment >= self.closes_at
        return opened and not closed


class Verdict(msgspec.Struct, frozen=True):
    """Where a purchase goes now. `hold_seconds` is how long its stock is held, if it gets some."""

    purchase: Waiting
    status: Status
    reason: Reason | None = None
    hold_seconds: int = 0
    error: Exception | None = None  #: why it was set aside, when it could not be decided


class _Line:
    """What is left of one item while its purchases are decided one after another."""

    def __init__(self, stock: Stock, batch_seqs: frozenset[int]) -> None:
        self.stock = stock
        self.available = stock.available
        self.unpaid = stock.unpaid
        self.somebody_waits = False
        # The rest of the waitlist, outside this batch, stands before every newcomer of this batch.
        self.waitlist_goes_on = stock.waitlist_end is not None and stock.waitlist_end not in batch_seqs

    def serve(self, purchase: Waiting) -> Verdict:
        before_it = self.somebody_waits or (self.waitlist_goes_on and purchase.status is Status.QUEUED)
        if purchase.quantity <= self.available and not before_it:
            self.available -= purchase.quantity
            self.unpaid += purchase.quantity
            return Verdict(purchase, Status.RESERVED, hold_seconds=self.stock.hold_seconds)
        if self.stock.waitlist and purchase.quantity <= self.available + self.unpaid:
            self.somebody_waits = True
            return Verdict(purchase, Status.WAITLISTED, Reason.WAITING_FOR_STOCK)
        if purchase.quantity <= self.available:
            # The waitlist was turned off and is longer than this batch: its turn comes when that is settled.
            return Verdict(purchase, purchase.status)
        return Verdict(purchase, Status.SOLD_OUT, Reason.SOLD_OUT)


def decide(
    purchases: Sequence[Waiting],
    stocks: Mapping[str, Stock],
    holdings: Mapping[tuple[str, str, str], int],
) -> list[Verdict]:
    """The verdicts of one batch, in the order in which they were given; none for a purchase that goes on waiting.

    `purchases` holds, of every item in it, the head of the line without gaps. `holdings` says how many units each
    (item, client, customer) has already; missing means none. A purchase that cannot be decided is set aside to
    needs_review, with the error, and does not stop the others.
    """
    return list(_verdicts(purchases, stocks, dict(holdings)))


def _verdicts(
    purchases: Sequence[Waiting], stocks: Mapping[str, Stock], holdings: dict[tuple[str, str, str], int]
) -> Iterator[Verdict]:
    batch_seqs = frozenset(purchase.seq for purchase in purchases)
    lines: dict[str, _Line] = {}
    for purchase in sorted(purchases, key=lambda p: (p.status is Status.QUEUED, p.seq)):
        try:
            if purchase.item not in lines:
                lines[purchase.item] = _Line(stocks[purchase.item], batch_seqs)
            verdict = _verdict(purchase, lines[purchase.item], holdings)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this row must not stop the lane
            yield Verdict(purchase, Status.NEEDS_REVIEW, Reason.UNDECIDABLE, error=error)
            continue
        if verdict.status is Status.RESERVED:
            holdings[purchase.holder] = holdings.get(purchase.holder, 0) + purchase.quantity
        if verdict.status is not purchase.status:
            yield verdict


def _verdict(purchase: Waiting, line: _Line, holdings: Mapping[tuple[str, str, str], int]) -> Verdict:
    stock = line.stock
    if not stock.on_sale_at(purchase.accepted_at):
        return Verdict(purchase, Status.CANCELLED, Reason.NOT_ON_SALE)
    if stock.per_customer is not None and holdings.get(purchase.holder, 0) + purchase.quantity > stock.per_customer:
        return Verdict(purchase, Status.LIMIT_REACHED, Reason.LIMIT_REACHED)
    return line.serve(purchase)
