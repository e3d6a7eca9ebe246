"""Items: created and changed by an admin, over HTTP or from a CSV file, by the same statement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    model_validator,
)
from sqlalchemy import RowMapping, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from shared.doors import Door
from shared.errors import ItemChangedError, StockBelowCommittedError
from shared.purchases import rfc3339
from shared.routing import lane_of
from shared.settings import Settings

#: As in the CHECK of `items.sku`.
SKU_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"


def _text_only(value: Any) -> Any:
    # A bare number could be seconds or milliseconds.
    if not isinstance(value, str | datetime):
        raise ValueError("must be a time with its zone, as text")
    return value


Sku = Annotated[str, Field(pattern=SKU_PATTERN, examples=["sku-1"])]
#: Stock and limits fit Postgres' integer; prices in minor units leave room for price times quantity in a bigint.
Count = Annotated[StrictInt, Field(ge=0, le=2_000_000_000)]
PositiveCount = Annotated[StrictInt, Field(ge=1, le=2_000_000_000)]
Price = Annotated[StrictInt, Field(ge=0, le=10**15)]
#: A moment with its zone, as text. Years that any zone and any client can show; Postgres alone could keep more.
Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_text_only),
    Field(ge=datetime(2000, 1, 1, tzinfo=UTC), lt=datetime(9000, 1, 1, tzinfo=UTC), examples=["2026-01-31T09:00:00Z"]),
]
#: The same moment as every time of the API is shown: RFC 3339 in UTC with six fraction digits.
ShownMoment = Annotated[datetime, PlainSerializer(rfc3339, return_type=str, when_used="json")]
HoldSeconds = Annotated[StrictInt, Field(ge=1, le=86_400)]


class ItemTerms(BaseModel):
    """What an admin says of an item. Prices in minor units; times with their zone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(strict=True, min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
    stock: Count
    price: Price
    currency: Annotated[str, Field(strict=True, pattern=r"^[A-Z]{3}$", examples=["EUR"])]
    #: The most units one customer may hold or have bought.
    per_customer: PositiveCount | None = None
    opens_at: Moment | None = None
    closes_at: Moment | None = None
    hold_seconds: HoldSeconds | None = None
    waitlist: StrictBool = True

    @model_validator(mode="after")
    def _opens_before_it_closes(self) -> Self:
        if self.opens_at is not None and self.closes_at is not None and self.closes_at <= self.opens_at:
            raise ValueError("closes_at must be after opens_at")
        return self


class Item(BaseModel):
    """An item as the API shows it: stock = available + held + sold."""

    sku: str
    name: str
    stock: int
    available: int
    held: int
    sold: int
    price: int
    currency: str
    per_customer: int | None
    opens_at: ShownMoment | None
    closes_at: ShownMoment | None
    hold_seconds: int
    waitlist: bool
    #: Another one after every change, also of what is held and sold. Shown as the ETag.
    rev: Annotated[int, Field(exclude=True, repr=False)]

    @classmethod
    def from_row(cls, row: RowMapping) -> Item:
        """The item of a row of `items`."""
        return cls(
            **{name: row[name] for name in cls.model_fields if name in row},
            held=row["unpaid"],
            sold=row["stock"] - row["available"] - row["unpaid"],
        )


#: Taking the row's lock first makes the check below and the change one step, and keeps the one lock order.
_LOCK = text("SELECT * FROM fairlane.items i WHERE i.sku = :sku FOR NO KEY UPDATE")

_CHANGE = text("""
UPDATE fairlane.items i
SET name = :name, price = :price, currency = :currency, stock = :stock,
    available = i.available + (:stock - i.stock),
    per_customer = :per_customer, opens_at = :opens_at, closes_at = :closes_at, hold_seconds = :hold_seconds,
    waitlist = :waitlist, rev = i.rev + 1, updated_at = now()
WHERE i.sku = :sku
RETURNING i.*
""")
"""A change of stock changes what is available by as much, so what is held and sold stays as it is."""

_CREATE = text("""
INSERT INTO fairlane.items AS i
    (sku, lane, name, price, currency, stock, available, per_customer, opens_at, closes_at, hold_seconds, waitlist)
VALUES (:sku, :lane, :name, :price, :currency, :stock, :stock, :per_customer, :opens_at, :closes_at, :hold_seconds,
        :waitlist)
ON CONFLICT DO NOTHING
RETURNING i.*
""")

_GET = text("SELECT i.* FROM fairlane.items i WHERE i.sku = :sku")

_PAGE = text("""
SELECT i.* FROM fairlane.items i WHERE i.sku > CAST(:after AS text) COLLATE "C" ORDER BY i.sku LIMIT :limit
""")
"""Promise: whoever pages through sees every item that was there all the time once, whatever is added meanwhile. A page
begins after a name and not after a number of items."""


class Saved(BaseModel):
    """What `save` did: the item, whether it is new, and its door record's revision inside `door`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    item: Item
    created: bool
    lane: int
    door: Door


@dataclass(frozen=True, slots=True)
class ItemPage:
    """Some items by name, in byte order. `next` is the name after which the next page begins; None on the last one."""

    items: Sequence[Item]
    next: str | None


async def save(
    connection: AsyncConnection,
    sku: str,
    terms: ItemTerms,
    settings: Settings,
    *,
    expected: Callable[[int], bool] | None = None,
) -> Saved:
    """Create the item or change it to these terms, within the caller's transaction.

    With `expected`, only an item is changed whose revision that accepts. It is asked while the item is locked.

    Raises StockBelowCommittedError, leaving the transaction to be rolled back, when the new stock is less than what is
    held and sold; ItemChangedError when the item is not as expected, or is not there.
    """
    values = {
        **terms.model_dump(),
        "sku": sku,
        "lane": lane_of(sku, settings.lanes),
        "hold_seconds": terms.hold_seconds or settings.hold_seconds,
    }
    if expected is None:
        created = (await connection.execute(_CREATE, values)).mappings().one_or_none()
        if created is not None:
            return _saved(created, is_new=True)
    before = (await connection.execute(_LOCK, {"sku": sku})).mappings().one_or_none()
    if before is None or (expected is not None and not expected(before["rev"])):
        raise ItemChangedError
    committed = before["stock"] - before["available"]
    if terms.stock < committed:
        raise StockBelowCommittedError(
            f"stock {terms.stock} is below the {committed} units already held or sold of {sku}"
        )
    try:
        changed = (await connection.execute(_CHANGE, values)).mappings().one()
    except IntegrityError as error:
        raise StockBelowCommittedError from error
    return _saved(changed, is_new=False)


def _saved(row: RowMapping, *, is_new: bool) -> Saved:
    return Saved(item=Item.from_row(row), created=is_new, lane=row["lane"], door=Door.from_row(row))


async def get(connection: AsyncConnection, sku: str) -> Item | None:
    """The item as it stands now, or None."""
    row = (await connection.execute(_GET, {"sku": sku})).mappings().one_or_none()
    return None if row is None else Item.from_row(row)


async def page(connection: AsyncConnection, *, after: str | None, limit: int) -> ItemPage:
    """The first `limit` items by name, of those after this one if it is given."""
    rows = (await connection.execute(_PAGE, {"after": after or "", "limit": limit + 1})).mappings().all()
    found = [Item.from_row(row) for row in rows[:limit]]
    return ItemPage(found, found[-1].sku if len(rows) > limit else None)
