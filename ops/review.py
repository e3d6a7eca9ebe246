"""Settling purchases in `needs_review`: what the machine could not find out, a person says, and the books stay right.

A purchase comes here when the provider stayed silent for too long, when it has more than one charge of one purchase, or
when its decision failed. Its stock stays held (one set aside before its decision holds none). Nothing is taken on
trust that can be looked up: a confirmation needs the charge on the provider's books, a refusal that there is none.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from shared import keys, statuses
from shared.calling import Caller, make_celery
from shared.database import check_lanes, make_async_engine, transaction
from shared.errors import FairlaneError
from shared.narrow_lock import Lock
from shared.purchases import PurchaseRecord
from shared.redis_clients import make_async_redis
from shared.settings import Settings
from shared.statements import review as sql
from workers.gateways import ChargeRecord, Confirmed, Declined, Gateway, GatewayUnavailable, load_gateway
from workers.record import Recorder, Result

log = structlog.get_logger()

#: What a purchase says that an operator declined.
DECLINED_BY_OPERATOR = "declined_by_operator"


class ReviewError(FairlaneError):
    """It cannot be settled like this; the message says why, and nothing was changed."""


@dataclass(frozen=True, slots=True)
class InReview:
    """One purchase in review. `charges` is what the provider has of it, None if it gave no answer."""

    record: PurchaseRecord
    fence: int | None
    attempt: int
    charges: tuple[ChargeRecord, ...] | None

    @property
    def succeeded(self) -> list[str]:
        """The ids of the charges that took money."""
        return [charge.id for charge in self.charges or () if charge.status == "succeeded"]


class Review:
    """The open reviews of one installation."""

    def __init__(self, engine: AsyncEngine, redis: Redis, gateway: Gateway, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._gateway = gateway
        self._settings = settings

    async def waiting(self, purchase: str | None = None) -> list[InReview]:
        """All purchases in review, oldest first, or the one of this id."""
        async with self._engine.connect() as connection:
            rows = (await connection.execute(sql.IN_REVIEW, {"id": purchase})).mappings().all()
        return [
            InReview(PurchaseRecord.from_row(row), row["fence"], row["attempt"], await self._ask(row["id"]))
            for row in rows
        ]

    async def confirm(self, purchase: str, charge: str) -> PurchaseRecord:
        """It was paid for by this charge. Raises ReviewError unless the provider has that charge as succeeded."""
        found = await self._one(purchase)
        if charge not in found.succeeded:
            has = ", ".join(found.succeeded) or "none"
            raise ReviewError(f"the provider has no succeeded charge {charge} of {purchase}; it has {has}")
        if found.fence is None:
            raise ReviewError(f"{purchase} was never claimed for charging: nothing of ours can have charged it")
        return await self._record(found, found.fence, Confirmed(charge))

    async def decline(self, purchase: str) -> PurchaseRecord:
        """It was not paid for: its stock returns.

        Raises ReviewError if the provider has a succeeded charge of it, or does not answer.
        """
        found = await self._one(purchase)
        if found.fence is None:
            return await self._decline_undecided(purchase)
        if found.charges is None:
            raise ReviewError(f"the provider does not say whether {purchase} was charged; ask again when it does")
        if found.succeeded:
            raise ReviewError(
                f"the provider has {', '.join(found.succeeded)} of {purchase}: confirm it, or pay it back"
            )
        return await self._record(found, found.fence, Declined(DECLINED_BY_OPERATOR))

    async def _one(self, purchase: str) -> InReview:
        found = await self.waiting(purchase)
        if not found:
            raise ReviewError(f"{purchase} is not in review")
        return found[0]

    async def _ask(self, purchase: str) -> tuple[ChargeRecord, ...] | None:
        try:
            return tuple(await self._gateway.find(purchase))
        except GatewayUnavailable:
            return None

    async def _record(self, found: InReview, fence: int, outcome: Confirmed | Declined) -> PurchaseRecord:
        caller = Caller(self._settings, make_celery(self._settings))
        lock = Lock(keys.charge_lock(found.record.id), f"review:{secrets.token_hex(4)}")
        result = Result(found.record.id, fence, found.attempt, lock, outcome)
        await Recorder(self._engine, self._redis, caller, self._settings).record([result])
        async with self._engine.connect() as connection:
            if (await connection.execute(sql.IN_REVIEW, {"id": found.record.id})).first() is not None:
                raise ReviewError(f"{found.record.id} could not be settled; look at the log")
        return found.record

    async def _decline_undecided(self, purchase: str) -> PurchaseRecord:
        async with transaction(self._engine, self._settings) as connection:
            values = {"id": purchase, "reason": DECLINED_BY_OPERATOR}
            rows = (await connection.execute(sql.DECLINE_UNDECIDED, values)).mappings().all()
        if not rows:
            raise ReviewError(f"{purchase} is not in review any more")
        record = PurchaseRecord.from_row(rows[0])
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                statuses.queue_write(pipe, [record], self._settings)
                await pipe.execute()
        except RedisError as error:
            log.warning("review_not_published", purchase=purchase, error=str(error))  # readers ask Postgres
        return record


@asynccontextmanager
async def open_review(settings: Settings) -> AsyncIterator[Review]:
    """The reviews of this installation. Needs `payment_url`. Raises SettingsError when the settings do not fit."""
    async with AsyncExitStack() as stack:
        gateway = load_gateway(
            settings.gateway, url=settings.payment_url or "", call_timeout=settings.call_timeout, connections=1
        )
        stack.push_async_callback(gateway.close)
        engine = make_async_engine(settings)
        stack.push_async_callback(engine.dispose)
        redis = make_async_redis(settings)
        stack.push_async_callback(redis.aclose)
        async with engine.connect() as connection:
            await connection.run_sync(check_lanes, settings.lanes)
        yield Review(engine, redis, gateway, settings)
