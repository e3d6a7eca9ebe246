"""Admission: what the door knows without asking Postgres, in one Lua call per group of requests.

A verdict to refuse is provisional: whoever asked looks the idempotency key up before saying so (`Acceptor.known`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from shared import doors, items, keys
from shared.doors import Door
from shared.errors import UnavailableError
from shared.groups import Group
from shared.redis_clients import script
from shared.settings import Settings

log = structlog.get_logger()

#: Requests judged in one call of the script: it runs alone on the server, 500 take it about a millisecond.
_BATCH = 500


class Verdict(StrEnum):
    """What the door says; the values are the replies of `shared/lua/admit.lua`."""

    KNOWN = "known"  #: the key stands for a purchase already: nothing is refused
    OPEN = "open"  #: may be accepted
    UNKNOWN_ITEM = "unknown-item"
    NOT_ON_SALE = "not-on-sale"
    SOLD_OUT = "sold-out"


@dataclass(frozen=True, slots=True)
class _Knock:
    """What the script must know of one request."""

    seen: str
    sku: str
    quantity: int


class Admission:
    """Judges requests by the door records in Redis, which it loads from Postgres where they are missing."""

    def __init__(self, engine: AsyncEngine, redis: Redis, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._settings = settings
        self._seen_ms = int(settings.key_seen_ttl * 1000)
        bound = settings.accept_queue
        self._knocks: Group[_Knock, Verdict] = Group(self._judge, batch=_BATCH, bound=bound)
        self._missing: Group[str, bool] = Group(self._load, batch=_BATCH, bound=bound)

    async def admit(self, client: str, key: str, sku: str, quantity: int) -> Verdict:
        """The door's verdict on a request. Raises UnavailableError when Redis, or Postgres at need, does not answer."""
        knock = _Knock(keys.seen(client, key), sku, quantity)
        verdict = await self._knocks.bring(knock)
        if verdict is Verdict.UNKNOWN_ITEM and await self._missing.bring(sku):
            verdict = await self._knocks.bring(knock)
            if verdict is Verdict.UNKNOWN_ITEM:
                # Loaded a moment ago and gone again: a flush just now. Accepting is always safe.
                return Verdict.OPEN
        return verdict

    async def _judge(self, knocks: Sequence[_Knock]) -> list[Verdict]:
        names = [name for knock in knocks for name in (knock.seen, keys.item(knock.sku))]
        try:
            verdicts = await self._redis.eval(
                script("admit"), len(names), *names, self._seen_ms, *(knock.quantity for knock in knocks)
            )
        except RedisError as error:
            raise UnavailableError from error
        return [Verdict(verdict) for verdict in verdicts]

    async def _load(self, skus: Sequence[str]) -> list[bool]:
        """Per item, whether it exists; its door record is then written. Once per process for all who wait."""
        try:
            async with self._engine.connect() as connection:
                rows = (await connection.execute(items.DOORS, {"skus": sorted(set(skus))})).mappings().all()
            found = [Door.from_row(row) for row in rows]
            async with self._redis.pipeline(transaction=False) as pipe:
                doors.queue_write(pipe, found, self._settings)
                await pipe.execute()
        except (DBAPIError, PoolTimeoutError, RedisError, OSError) as error:
            raise UnavailableError from error
        known = {door.sku for door in found}
        return [sku in known for sku in skus]
