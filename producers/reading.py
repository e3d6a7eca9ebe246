"""Reading purchases: Redis first, in groups; Postgres where Redis cannot be believed, also in groups."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from producers.pace import Pace
from shared import statuses
from shared.errors import UnavailableError
from shared.groups import Group
from shared.purchases import PurchaseRecord
from shared.settings import Settings
from shared.statements import accept as sql
from shared.states import Status

log = structlog.get_logger()

#: Purchases read at once. Larger groups only add waiting.
_BATCH = 500
#: Reads waiting for the next group. More than a whole crowd; beyond it something is stuck, and a 503 is quicker.
_BOUND = 20_000


@dataclass(frozen=True, slots=True)
class Reading:
    """A purchase and the watermark of its lane, if that is known."""

    record: PurchaseRecord
    decided_through: int | None

    @property
    def position(self) -> int | None:
        """At most how many stand before it in its lane, itself included; None unless it is queued.

        An upper bound: `seq` counts all lanes. It is estimated from the lane's watermark, as counting a line of a
        million for every poll would cost more than deciding it.
        """
        if self.record.status is not Status.QUEUED or self.decided_through is None:
            return None
        return max(1, self.record.seq - self.decided_through)


class Reader:
    """Answers polls. One per API process."""

    def __init__(self, engine: AsyncEngine, redis: Redis, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._settings = settings
        #: How fast the lanes move, as far as the reads of this process tell.
        self.pace = Pace()
        self._cached: Group[str, Reading | None] = Group(self._read_cached, batch=_BATCH, bound=_BOUND)
        self._stored: Group[str, Reading | None] = Group(self._read_stored, batch=_BATCH, bound=_BOUND)

    async def read(self, purchase_id: str, at_least: int = 0) -> Reading | None:
        """The purchase with this id (32 hex digits), whoever's it is, or None.

        `at_least` is a revision the caller has seen: Postgres is asked if Redis has only an older one, so that nobody
        is shown a state from before the one they know. Raises UnavailableError when neither Redis nor Postgres could
        tell.
        """
        cached = await self._cached.bring(purchase_id)
        if cached is not None and cached.record.rev >= at_least:
            return cached
        return await self._stored.bring(purchase_id)

    async def _read_cached(self, purchase_ids: Sequence[str]) -> list[Reading | None]:
        try:
            found = await statuses.read_many(self._redis, purchase_ids, self._settings.lanes)
        except RedisError as error:
            log.warning("statuses_not_read", purchases=len(purchase_ids), error=str(error))
            return [None] * len(purchase_ids)
        readings = [
            Reading(cached.record, cached.decided_through)
            if cached is not None and cached.believable(self._settings.status_fresh)
            else None
            for cached in found
        ]
        self._watch_lanes(filter(None, readings))
        return readings

    async def _read_stored(self, purchase_ids: Sequence[str]) -> list[Reading | None]:
        try:
            async with self._engine.connect() as connection:
                rows = (await connection.execute(sql.BY_ID, {"ids": sorted(set(purchase_ids))})).mappings().all()
        except (DBAPIError, PoolTimeoutError, OSError) as error:
            raise UnavailableError from error
        found = {
            reading.record.id: reading
            for reading in (Reading(PurchaseRecord.from_row(row), row["decided_through"]) for row in rows)
        }
        self._watch_lanes(found.values())
        await self._mend(found.values())
        return [found.get(UUID(purchase_id).hex) for purchase_id in purchase_ids]

    def _watch_lanes(self, readings: Iterable[Reading]) -> None:
        """Only lanes in which somebody waits tell how fast they move."""
        watermarks = {
            reading.record.lane: reading.decided_through
            for reading in readings
            if reading.record.status is Status.QUEUED and reading.decided_through is not None
        }
        now = time.monotonic()
        for lane, decided_through in watermarks.items():
            self.pace.observe(lane, decided_through, now)

    async def _mend(self, readings: Collection[Reading]) -> None:
        """Write what Postgres said to Redis, so that the next poll need not ask again, and knows the same place."""
        watermarks = {
            reading.record.lane: reading.decided_through for reading in readings if reading.decided_through is not None
        }
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                statuses.queue_write(pipe, [reading.record for reading in readings], self._settings)
                for lane, decided_through in watermarks.items():
                    statuses.queue_missing_watermark(pipe, lane, decided_through)
                await pipe.execute()
        except RedisError as error:
            log.warning("statuses_not_mended", purchases=len(readings), error=str(error))
