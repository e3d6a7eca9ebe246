"""From an item to its lane, and from a lane to its Celery queue.

A lane is `crc32(sku) % lanes`: the same on every machine and in every version of Python, unlike `hash()`. One item
always has one lane, so whoever decides the lane decides all purchases of the item in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

DECIDE = "purchases.decide"
CHARGE = "purchases.charge"
RECONCILE = "purchases.reconcile"

CHARGES_QUEUE = "charges"


def lane_of(sku: str, lanes: int) -> int:
    """The lane (0 … lanes - 1) that decides all purchases of the item `sku`."""
    return crc32(sku.encode()) % lanes


def queue_of(lane: int) -> str:
    """The Celery queue of a lane: `lane.07`."""
    return f"lane.{lane:02d}"


def queues(lanes: int) -> list[str]:
    """Every queue of the system: one per lane, in order, then the charges."""
    return [*(queue_of(lane) for lane in range(lanes)), CHARGES_QUEUE]


class Router:
    """Celery's router (`task_routes`): a decide task goes to the queue of its lane, a charge task to the charges.

    A decide task names its lane (`{"lane": 7}`) or an item (`{"sku": "sku-1"}`), whose lane is then looked up, so
    that an operator can nudge an item without knowing its lane.
    """

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes

    def __call__(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        task: object = None,
        **_: Any,
    ) -> dict[str, str] | None:
        """The route of one message, or None for a task that is not ours.

        Raises ValueError for a decide task that names no lane of this system: such a message would wait in a queue
        that nobody reads.
        """
        if name in (CHARGE, RECONCILE):
            return {"queue": CHARGES_QUEUE}
        if name != DECIDE:
            return None
        return {"queue": queue_of(self.lane(kwargs))}

    def lane(self, kwargs: Mapping[str, Any]) -> int:
        """The lane that the arguments of a decide task name."""
        match kwargs:
            case {"lane": int(lane)} if 0 <= lane < self._lanes:
                return lane
            case {"sku": str(sku)}:
                return lane_of(sku, self._lanes)
        raise ValueError(f"{DECIDE} needs a lane below {self._lanes} or a sku, not {dict(kwargs)!r}")
