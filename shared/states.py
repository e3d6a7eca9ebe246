"""The states of a purchase and the one table of how they may follow each other. Pure: no clock, no database.

The database repeats what can be said of a single row (which columns a state needs) in CHECK constraints, see
the migrations; which state may follow which is said here, and every UPDATE that moves a purchase names the states
it may leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Status(StrEnum):
    """Where a purchase stands."""

    QUEUED = "queued"  #: accepted and committed; waits for its lane's turn
    WAITLISTED = "waitlisted"  #: nothing is left now, but a hold ahead of it may still fall back
    RESERVED = "reserved"  #: stock is held for it; the payment call has not been claimed
    CHARGING = "charging"  #: a claim with a fence is committed; the call may be under way
    IN_DOUBT = "in_doubt"  #: the call may or may not have been executed; stock stays held
    NEEDS_REVIEW = "needs_review"  #: only an operator can tell what happened
    CONFIRMED = "confirmed"  #: charged exactly once; the stock is sold
    DECLINED = "declined"  #: the provider refused the payment; the hold is released
    SOLD_OUT = "sold_out"  #: nothing was left, and no hold ahead of it could fall back
    LIMIT_REACHED = "limit_reached"  #: the customer already holds what one customer may have of the item
    CANCELLED = "cancelled"  #: called off before a charge could have been sent
    EXPIRED = "expired"  #: its hold or its wait ran out before a charge could have been sent


FINAL = frozenset(
    {
        Status.CONFIRMED,
        Status.DECLINED,
        Status.SOLD_OUT,
        Status.LIMIT_REACHED,
        Status.CANCELLED,
        Status.EXPIRED,
    }
)
"""States that never change again."""

WAITING = frozenset({Status.QUEUED, Status.WAITLISTED})
"""States without stock that may still get some."""

HOLDING = frozenset({Status.RESERVED, Status.CHARGING, Status.IN_DOUBT, Status.NEEDS_REVIEW, Status.CONFIRMED})
"""States that count against a customer's limit: stock is held for them, or sold to them."""

AWAITING_OUTCOME = frozenset({Status.CHARGING, Status.IN_DOUBT, Status.NEEDS_REVIEW})
"""States that an outcome with the row's own fence may still settle."""

TRANSITIONS: Mapping[Status, frozenset[Status]] = MappingProxyType(
    {
        Status.QUEUED: frozenset(
            {
                Status.RESERVED,
                Status.WAITLISTED,
                Status.SOLD_OUT,
                Status.LIMIT_REACHED,
                Status.CANCELLED,
                Status.EXPIRED,
                Status.NEEDS_REVIEW,  # a row that cannot be decided is set aside; it holds nothing
            }
        ),
        Status.WAITLISTED: frozenset(
            {
                Status.RESERVED,
                Status.SOLD_OUT,
                Status.LIMIT_REACHED,
                Status.CANCELLED,
                Status.EXPIRED,
                Status.NEEDS_REVIEW,
            }
        ),
        Status.RESERVED: frozenset({Status.CHARGING, Status.CANCELLED, Status.EXPIRED}),
        Status.CHARGING: frozenset({Status.CONFIRMED, Status.DECLINED, Status.RESERVED, Status.IN_DOUBT}),
        Status.IN_DOUBT: frozenset({Status.CONFIRMED, Status.DECLINED, Status.RESERVED, Status.NEEDS_REVIEW}),
        Status.NEEDS_REVIEW: frozenset({Status.CONFIRMED, Status.DECLINED}),
        **{final: frozenset() for final in FINAL},
    }
)
"""Which states may follow a state. A final state is followed by none."""


def may_follow(before: Status, after: Status) -> bool:
    """Whether a purchase in `before` may move to `after`."""
    return after in TRANSITIONS[before]


class Reason(StrEnum):
    """Why a purchase stands where it stands; shown to the client as `reason`."""

    NOT_ON_SALE = "not_on_sale"  #: accepted outside the item's opening hours
    SOLD_OUT = "sold_out"  #: less is left than was asked for, and no hold can make up for it
    LIMIT_REACHED = "limit_reached"  #: more than one customer may have
    WAITING_FOR_STOCK = "waiting_for_stock"  #: on the waitlist
    UNDECIDABLE = "undecidable"  #: set aside: the decision itself failed
    CANCELLED_BY_CLIENT = "cancelled_by_client"  #: called off by the client that bought
