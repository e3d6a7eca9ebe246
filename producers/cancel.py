"""Cancelling: a purchase that waits or holds stock is called off, and whoever waits behind it moves up.

It races the workers, and every race is settled by the purchase's row lock: whoever has it first goes on, and the other
sees what became of it. A claim that came first means too late, as its call may be under way; a claim that comes later
finds nothing to claim. What was held goes back in the transaction that cancels.

After the commit the status and the item's door record are written before the answer, so that a client that asks next
sees its purchase cancelled; the lane is called in the background. What fails there is only logged: readers fall back
on Postgres, door records expire, and the sweep calls a lane whose waitlist can move.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import TextClause
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared import doors, statuses
from shared.calling import Call, Caller, lane_call
from shared.crash_points import crash_point
from shared.database import is_passing, transaction
from shared.doors import Door
from shared.errors import UnavailableError
from shared.purchases import PurchaseRecord
from shared.settings import Settings
from shared.statements import cancel as sql
from shared.statements import charge
from shared.states import WAITING, Status, may_follow

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The purchase is cancelled.

    `before` is the state that it left now; None if it was cancelled already. `door` is what the door must know of its
    item, if units went back.
    """

    record: PurchaseRecord
    before: Status | None = None
    door: Door | None = None


@dataclass(frozen=True, slots=True)
class TooLate:
    """The purchase is settled, or may have been charged. It stays as it is."""

    record: PurchaseRecord


@dataclass(frozen=True, slots=True)
class UnknownPurchase:
    """This client has no such purchase."""


Cancellation = Cancelled | TooLate | UnknownPurchase


class Canceller:
    """Cancels purchases, each in a transaction of its own. One per API process."""

    def __init__(self, engine: AsyncEngine, redis: Redis, caller: Caller, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._caller = caller
        self._settings = settings
        #: Half of the connections: one that waits for a lock keeps its own, and orders need some, too.
        self._turns = asyncio.Semaphore(max(1, settings.database_pool // 2))
        self._calling: set[asyncio.Task[None]] = set()

    async def cancel(self, client: str, purchase_id: str) -> Cancellation:
        """Cancel this client's purchase (32 hex digits). Committed, and told to Redis, when this returns.

        Raises UnavailableError when Postgres failed, or somebody kept the purchase or its item locked for longer than
        `LOCK_TIMEOUT`: it may or may not be cancelled then, and asking again finds out.
        """
        try:
            async with self._turn():
                cancellation = await self._write(client, purchase_id)
        except (SQLAlchemyError, OSError) as error:
            if is_passing(error):
                raise UnavailableError from error
            raise
        if isinstance(cancellation, Cancelled):
            await self._tell(cancellation)
        return cancellation

    async def close(self) -> None:
        """Finish the calls under way."""
        while self._calling:
            await asyncio.wait(self._calling)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A connection's worth of room, within `LOCK_TIMEOUT`: not had behind locks, or in a burst of hundreds."""
        try:
            async with asyncio.timeout(self._settings.lock_timeout):
                await self._turns.acquire()
        except TimeoutError as error:
            raise UnavailableError("too many cancellations at once") from error
        try:
            yield
        finally:
            self._turns.release()

    async def _write(self, client: str, purchase_id: str) -> Cancellation:
        values = {"id": purchase_id, "client": client}
        async with transaction(self._engine, self._settings) as connection:
            standing = await _standing(connection, sql.STANDING, **values)
            if isinstance(standing, PurchaseRecord):
                standing = await _standing(connection, sql.LOCK, **values)
            if not isinstance(standing, PurchaseRecord):
                return standing
            cancelled = (await connection.execute(sql.CANCEL, {"id": purchase_id})).mappings().one_or_none()
            if cancelled is None:
                return TooLate(standing)
            door = await self._give_back(connection, standing) if standing.status is Status.RESERVED else None
            crash_point("cancel.before_commit")
        crash_point("cancel.after_commit")
        return Cancelled(PurchaseRecord.from_row(cancelled), standing.status, door)

    async def _give_back(self, connection: AsyncConnection, held: PurchaseRecord) -> Door:
        """Return what this hold held. The update of the one row takes its lock."""
        returned = {"skus": [held.item], "returned": [held.quantity], "sold": [0]}
        return Door.from_row((await connection.execute(charge.SETTLE_STOCK, returned)).mappings().one())

    async def _tell(self, cancelled: Cancelled) -> None:
        record = cancelled.record
        calls: list[Call] = []
        if cancelled.before in (Status.WAITLISTED, Status.RESERVED):
            # Also if nobody waits behind it as far as can be seen from here: a decision under way may just now put
            # somebody there. A call that finds nothing costs one short transaction.
            calls.append(lane_call(record.lane))
        left = doors.no_longer_waiting([record]) if cancelled.before in WAITING else {}
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                self._caller.queue_marks(pipe, calls)
                # Also of one that was cancelled before: whoever did it may not have come to write it.
                statuses.queue_write(pipe, [record], self._settings)
                doors.queue_write(pipe, [cancelled.door] if cancelled.door else [], self._settings, left)
                replies: list[Any] = await pipe.execute()
        except RedisError as error:
            log.warning("cancelled_not_published", purchase=record.id, error=str(error))
            return
        to_publish = self._caller.to_publish(calls, replies)
        if to_publish:
            calling = asyncio.create_task(asyncio.to_thread(self._caller.publish, to_publish))
            self._calling.add(calling)
            calling.add_done_callback(self._calling.discard)


async def _standing(connection: AsyncConnection, statement: TextClause, **values: Any) -> PurchaseRecord | Cancellation:
    """The purchase if it can be cancelled as it stands; otherwise the answer."""
    row = (await connection.execute(statement, values)).mappings().one_or_none()
    if row is None:
        return UnknownPurchase()
    record = PurchaseRecord.from_row(row)
    if may_follow(record.status, Status.CANCELLED):
        return record
    return Cancelled(record) if record.status is Status.CANCELLED else TooLate(record)
