"""Door records: the copy in Redis of what admission must know of an item, versioned by `items.rev`, short-lived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil

from sqlalchemy import RowMapping

from shared import keys
from shared.redis_clients import Pipeline, script
from shared.settings import Settings

COLUMNS = "i.sku, i.rev, i.available, i.unpaid, i.waitlist, i.opens_at, i.closes_at"
"""What a statement must return of `items i` to make a door record."""


@dataclass(frozen=True, slots=True)
class Door:
    """What the door knows of one item at one revision.

    `within_reach` is how many units a new purchase may still get: what is available and, with a waitlist, what
    unpaid holds may give back.
    """

    sku: str
    rev: int
    within_reach: int
    opens_at: datetime | None
    closes_at: datetime | None

    @classmethod
    def from_row(cls, row: RowMapping) -> Door:
        """The door record of a row with the columns `COLUMNS`."""
        within_reach = row["available"] + (row["unpaid"] if row["waitlist"] else 0)
        return cls(row["sku"], row["rev"], within_reach, row["opens_at"], row["closes_at"])


def queue_write(pipe: Pipeline, doors: Sequence[Door], settings: Settings) -> None:
    """Queue the write of these door records on a pipeline; an older revision never overwrites a newer one."""
    if not doors:
        return
    args: list[str | int] = [int(settings.door_ttl * 1000)]
    for door in doors:
        args += (door.rev, door.within_reach, _ms(door.opens_at), _ms(door.closes_at))
    pipe.eval(script("write_doors"), len(doors), *(keys.item(door.sku) for door in doors), *args)


def _ms(moment: datetime | None) -> int | str:
    return "" if moment is None else ceil(moment.timestamp() * 1000)
