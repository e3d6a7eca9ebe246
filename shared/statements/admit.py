"""Admission: what the door must know of items that Redis does not know."""

from __future__ import annotations

from sqlalchemy import text

from shared import doors

#: Rows that are counted, whatever is within reach: 2 to 5 ms. With so many waiting and less than that within reach, an
#: item is full by any count; but its stock may be raised in the next moment, and the count is not made anew for that.
COUNTED = 10_000

DOORS = text(f"SELECT {doors.COLUMNS} FROM fairlane.items i WHERE i.sku = ANY(CAST(:skus AS text[]))")
"""The items a door wants to know of. By their key alone, so that none of them waits for another's count."""

WAITING = text(f"""
SELECT i.sku, (
    SELECT coalesce(sum(w.quantity), 0) FROM (
        SELECT p.quantity FROM fairlane.purchases p
        WHERE p.item = i.sku AND CASE WHEN p.status IN ('queued', 'waitlisted') THEN true ELSE false END
        ORDER BY p.quantity
        LIMIT greatest({COUNTED}, i.available + i.unpaid) + 1
    ) w
) AS waiting
FROM fairlane.items i WHERE i.sku = ANY(CAST(:skus AS text[]))
""")
"""The waiting units of each item. No more rows are read than make the item full, as each is a unit or more. That may be
many: with a million within reach and waiting, a million index entries are read once, in up to 0.4 s. The order is the
index's, so that the planner uses it: it takes every item for a common one, and would read the whole table for one that
nobody waits for."""
