"""Accepting: a purchase is committed in Postgres before anybody is told so.

Requests are committed by the group: while one batch commits, the next collects. After the commit their statuses are
written and their lanes called, in the background, as neither is a promise: what fails there is only logged, readers
fall back on Postgres, and the sweep calls the lane.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from producers.purchase_ids import new_purchase_id
from shared import statuses
from shared.calling import Caller
from shared.crash_points import crash_point
from shared.database import cause, is_passing, transaction
from shared.errors import UnavailableError
from shared.groups import Group
from shared.logs import nobodys_context
from shared.purchases import PurchaseRecord
from shared.settings import Settings
from shared.statements import accept as sql

log = structlog.get_logger()

#: Made once: `json.dumps` makes another one in every call.
_canonical = json.JSONEncoder(separators=(",", ":")).encode
_encode = msgspec.json.Encoder().encode


class Order(msgspec.Struct, frozen=True):
    """A valid request to buy, not yet accepted. `id` becomes the purchase's if the key is new."""

    client: str
    key: str
    item: str
    quantity: int
    customer: str
    payment_token: str
    id: str = msgspec.field(default_factory=new_purchase_id)

    def __repr__(self) -> str:
        return f"Order(id={self.id!r}, client={self.client!r}, item={self.item!r}, quantity={self.quantity})"

    def row(self) -> dict[str, Any]:
        """What is recorded of it, by the columns of `purchases`."""
        return {
            "id": self.id,
            "client_id": self.client,
            "idempotency_key": self.key,
            "fingerprint": f"\\x{self.fingerprint().hex()}",
            "item": self.item,
            "quantity": self.quantity,
            "customer": self.customer,
            "payment_token": self.payment_token,
        }

    def fingerprint(self) -> bytes:
        """What was asked for, whatever the order and spacing of the body's fields."""
        body = [self.item, self.quantity, self.customer, self.payment_token]
        return sha256(_canonical(body).encode()).digest()


class Accepted(msgspec.Struct, frozen=True):
    """The purchase that the key stands for; `replayed` if an earlier request made it."""

    record: PurchaseRecord
    replayed: bool


@dataclass(frozen=True, slots=True)
class KeyReused:
    """The key stands for a purchase that was asked for with another body."""


@dataclass(frozen=True, slots=True)
class UnknownItem:
    """There is no such item, so nothing was recorded."""


Acceptance = Accepted | KeyReused | UnknownItem


@dataclass(frozen=True, slots=True)
class Known:
    """A purchase found by its key, and the fingerprint of the request that made it."""

    record: PurchaseRecord
    fingerprint: bytes

    def answer(self, order: Order) -> Accepted | KeyReused:
        """What a later request with the same key is told."""
        if self.fingerprint != order.fingerprint():
            return KeyReused()
        return Accepted(self.record, replayed=self.record.id != order.id)


class Acceptor:
    """Commits orders in groups. One per API process."""

    def __init__(self, engine: AsyncEngine, redis: Redis, caller: Caller, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._caller = caller
        self._settings = settings
        self._orders: Group[Order, Acceptance] = Group(
            self._accept_batch, batch=settings.accept_batch, bound=settings.accept_queue
        )
        self._lookups: Group[tuple[str, str], Known | None] = Group(
            self._look_up_batch, batch=settings.accept_batch, bound=settings.accept_queue
        )
        self._untold: list[PurchaseRecord] = []
        self._telling: asyncio.Task[None] | None = None

    async def accept(self, order: Order) -> Acceptance:
        """The order's purchase, committed; or why there is none.

        Raises QueueFullError when too many wait for a commit, with nothing recorded, and UnavailableError when
        Postgres failed: the purchase may or may not be recorded then, and a retry with the same key finds out.
        """
        return await self._orders.bring(order)

    async def known(self, order: Order) -> Accepted | KeyReused | None:
        """What the order's key stands for already, or None. Asked before any refusal, as a retry must get its purchase.

        Raises UnavailableError when Postgres failed.
        """
        found = await self._lookups.bring((order.client, order.key))
        return None if found is None else found.answer(order)

    async def close(self) -> None:
        """Finish what was begun: commits under way, and what follows them."""
        await self._orders.drain()
        while self._telling is not None:
            await asyncio.wait([self._telling])

    async def _accept_batch(self, orders: Sequence[Order]) -> list[Acceptance | Exception]:
        try:
            inserted, found = await self._write(orders)
        except (SQLAlchemyError, OSError, ValueError) as error:
            if is_passing(error):
                log.error("commit_failed_or_unknown", orders=len(orders), error=cause(error))
                raise UnavailableError from error
            # A value was refused that validation let through. Halve the batch until it fails alone.
            if len(orders) == 1:
                log.error("order_refused", client=orders[0].client, error=cause(error))
                raise
            half = len(orders) // 2
            return [*await self._accept_half(orders[:half]), *await self._accept_half(orders[half:])]
        self._tell_later(list(inserted.values()))
        return [self._acceptance(order, inserted, found) for order in orders]

    async def _accept_half(self, orders: Sequence[Order]) -> list[Acceptance | Exception]:
        try:
            return await self._accept_batch(orders)
        except (UnavailableError, SQLAlchemyError, ValueError) as error:
            return [error] * len(orders)

    async def _write(self, orders: Sequence[Order]) -> tuple[dict[str, PurchaseRecord], dict[tuple[str, str], Known]]:
        """New purchases by id, and what the other keys stand for. Committed when this returns."""
        async with transaction(self._engine, self._settings) as connection:
            rows = await connection.execute(
                sql.INSERT,
                {"orders": _encode([order.row() for order in orders]).decode()},
            )
            inserted = {record.id: record for record in map(PurchaseRecord.from_row, rows.mappings())}
            others = [(order.client, order.key) for order in orders if order.id not in inserted]
            found = await _find(connection, others) if others else {}
            crash_point("accept.before_commit")
        crash_point("accept.after_commit")
        return inserted, found

    def _acceptance(
        self, order: Order, inserted: dict[str, PurchaseRecord], found: dict[tuple[str, str], Known]
    ) -> Acceptance:
        if record := inserted.get(order.id):
            return Accepted(record, replayed=False)
        if known := found.get((order.client, order.key)):
            return known.answer(order)
        return UnknownItem()

    async def _look_up_batch(self, wanted: Sequence[tuple[str, str]]) -> list[Known | None]:
        try:
            async with self._engine.connect() as connection:
                found = await _find(connection, list(dict.fromkeys(wanted)))
        except (SQLAlchemyError, OSError) as error:
            raise UnavailableError from error
        return [found.get(key) for key in wanted]

    def _tell_later(self, records: Sequence[PurchaseRecord]) -> None:
        """Write their statuses and call their lanes in the background: what comes while that goes on is told together.

        While Redis or the broker hangs, no more are kept than may wait for a commit.
        """
        room = self._settings.accept_queue - len(self._untold)
        if room < len(records):
            log.warning("accepted_not_published", purchases=len(records) - room, error="too many wait to be told")
        self._untold += records[: max(room, 0)]
        if self._telling is None and self._untold:
            self._telling = asyncio.create_task(self._tell(), context=nobodys_context())

    async def _tell(self) -> None:
        most = self._settings.accept_batch
        try:
            while self._untold:
                records, self._untold = self._untold[:most], self._untold[most:]
                await self._publish(records)
        finally:
            self._telling = None

    async def _publish(self, records: Sequence[PurchaseRecord]) -> None:
        calls = self._caller.calls_for((record.lane, record.id) for record in records)
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                self._caller.queue_marks(pipe, calls)
                statuses.queue_write(pipe, records, self._settings)
                replies = await pipe.execute()
        except RedisError as error:
            log.warning("accepted_not_published", purchases=len(records), error=str(error))
            return
        to_publish = self._caller.to_publish(calls, replies)
        if to_publish:
            await asyncio.to_thread(self._caller.publish, to_publish)
        crash_point("accept.after_publish")


async def _find(connection: AsyncConnection, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Known]:
    asked = [{"client_id": client, "idempotency_key": key} for client, key in wanted]
    rows = await connection.execute(sql.BY_KEY, {"keys": _encode(asked).decode()})
    return {
        (row["client_id"], row["idempotency_key"]): Known(PurchaseRecord.from_row(row), bytes(row["fingerprint"]))
        for row in rows.mappings()
    }
