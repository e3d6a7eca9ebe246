"""What admission must know of an item, in Redis, short-lived.

- The door record: a copy of its row, versioned by `items.rev`.
- The count of its waiting units: let in, and neither given nor refused stock yet. Admission raises it, and whoever
  settles what waits lowers it. A count that is not there is taken from Postgres.

The count is close, not exact, and no promise about stock rests on it. It can be off by the units

- of a process that failed between two steps, or of a command that Redis did not carry out;
- of a decision (or a cancellation) that was being told to Redis while a missing count was loaded. Too low: Postgres was
  read after its commit and the count written before it was told, so its units are taken off though they are not in it.
  Too high: Postgres was read before its commit and the count written after it was told, so they are never taken off;
- of requests that were between the door and their commit when a missing count was loaded: Postgres does not show them
  yet, so it is too low;
- of two requests with one key and different bodies, if the one that came first is not recorded and the other is.

Such an error stays until the count is gone. While it is too low, the queue may be longer than the stock by that: these
purchases end sold_out or waitlisted. While it is too high, so many units fewer may wait; at worst everybody is refused.
But who is refused does not change the count, and one that nothing changed for the life of a door record is gone and is
loaded again: nobody is refused by an error for longer than that after the last change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil

from sqlalchemy import RowMapping

from shared import keys
from shared.purchases import PurchaseRecord
from shared.redis_clients import Pipeline, script
from shared.settings import Settings

COLUMNS = "i.sku, i.rev, i.available, i.unpaid, i.waitlist, i.opens_at, i.closes_at"
"""What a statement must return of `items i` to make a door record."""


@dataclass(frozen=True, slots=True)
class Door:
    """What the door knows of one item at one revision.

    `within_reach` is how many units a new purchase may still get: what is available and, with a waitlist, what
    unpaid holds may give back. `available` is the part of it that nobody holds.
    """

    sku: str
    rev: int
    within_reach: int
    available: int
    opens_at: datetime | None
    closes_at: datetime | None

    @classmethod
    def from_row(cls, row: RowMapping) -> Door:
        """The door record of a row with the columns `COLUMNS`."""
        available = row["available"]
        within_reach = available + (row["unpaid"] if row["waitlist"] else 0)
        return cls(row["sku"], row["rev"], within_reach, available, row["opens_at"], row["closes_at"])


def queue_write(
    pipe: Pipeline, doors: Sequence[Door], settings: Settings, left: Mapping[str, int] | None = None
) -> None:
    """Queue the write of these door records on a pipeline; an older revision never overwrites a newer one.

    `left` says per item how many units wait no longer (see `no_longer_waiting`). They are taken off in the same step
    as the record is written, so that nobody is let in on units that neither wait nor are held yet.
    """
    left = left or {}
    written = {door.sku: door for door in doors}
    skus = sorted(written.keys() | left.keys())
    if not skus:
        return
    args: list[str | int] = [int(settings.door_ttl * 1000), count_ttl_ms(settings)]
    for sku in skus:
        door = written.get(sku)
        if door is None:
            args += ("", "", "", "", "")
        else:
            args += (door.rev, door.within_reach, door.available, _ms(door.opens_at), _ms(door.closes_at))
        args.append(left.get(sku, 0))
    names = [name for sku in skus for name in (keys.item(sku), keys.waiting(sku))]
    pipe.eval(script("write_doors"), len(names), *names, *args)


def no_longer_waiting(records: Iterable[PurchaseRecord]) -> dict[str, int]:
    """Per item, the units that wait no longer (`left` of `queue_write`), of purchases all of which waited before."""
    left: defaultdict[str, int] = defaultdict(int)
    for record in records:
        if not record.waiting:
            left[record.item] += record.quantity
    return dict(left)


def queue_counts(pipe: Pipeline, counts: Mapping[str, int], settings: Settings) -> None:
    """Queue the write of these counts of waiting units on a pipeline. One that is there stays: it also has the
    units of those who are on their way to their commit."""
    for sku, units in counts.items():
        pipe.set(keys.waiting(sku), units, px=count_ttl_ms(settings), nx=True)


def count_ttl_ms(settings: Settings) -> int:
    """How long a count of waiting units lives after its last change: as long as a door record."""
    return int(settings.door_ttl * 1000)


def _ms(moment: datetime | None) -> int | str:
    return "" if moment is None else ceil(moment.timestamp() * 1000)
