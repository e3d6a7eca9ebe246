"""Admission: what the door knows without asking Postgres, in one Lua call per group of requests.

If limits are set, there must be a token for a request (`producers.rates`). It uses it, whatever else becomes of it.

It is let in when it may still get something: its item is on sale, and what is within reach is enough for it and for all
who were let in before and have not been settled. So the queue follows the stock. Whoever is let in takes its units in
that call, and gives them back if it is not recorded.

A verdict to refuse is provisional: whoever asked looks the idempotency key up before saying so (`Acceptor.known`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from producers.rates import Allowance, Whose, limits_of, policy_field
from shared import doors, keys
from shared.database import transaction
from shared.doors import Door
from shared.errors import UnavailableError
from shared.groups import Group
from shared.redis_clients import script
from shared.settings import Settings
from shared.statements import admit as sql

log = structlog.get_logger()

#: Requests judged in one call of the script: it runs alone on the server, 500 take it a few milliseconds.
_BATCH = 500

#: Seconds between two such calls. Requests that are judged together are committed together, told of together, and
#: decided in one visit to their lane; with a few hundred a second this halves what each of them costs. A request that
#: comes alone waits for nothing.
_KNOCKS_EVERY = 0.05

#: Times that something missing is loaded for one request: its item, then its count, and each once more, as Redis may be
#: flushed, or a record expire, just then.
_LOADS = 4


class Verdict(StrEnum):
    """What the door says; the values are the replies of `shared/lua/admit.lua`."""

    KNOWN = "known"  #: the key stands for a purchase already, or for one under way: nothing is refused
    OPEN = "open"  #: may be accepted; its units count as waiting from now on
    UNKNOWN_ITEM = "unknown-item"
    NOT_ON_SALE = "not-on-sale"
    SOLD_OUT = "sold-out"
    QUEUE_FULL = "queue-full"  #: enough units wait already for all that is within reach
    CLIENT_RATE = Whose.CLIENT.value  #: the client has no token left
    CUSTOMER_RATE = Whose.CUSTOMER.value  #: the customer has no token left
    TOTAL_RATE = Whose.ALL.value  #: nobody has: all together send more than is allowed
    NOT_COUNTED = "not-counted"  #: nobody knows how many units wait; never the answer to a request


class Request(msgspec.Struct, frozen=True):
    """What admission must know of a request to buy."""

    client: str
    key: str
    item: str
    quantity: int
    customer: str


class Ruling(msgspec.Struct, frozen=True):
    """The verdict on a request. `wait` is after how many seconds it may be worth asking again: the limit that refused
    has a token for it then, or a full queue may have a place.

    `allowances` is what is left of each limit that is set, in the order of `Admission.limits`.
    """

    verdict: Verdict
    wait: float = 0.0
    allowances: tuple[Allowance, ...] = ()

    @property
    def lets_in(self) -> bool:
        """Whether the request may be accepted."""
        return self.verdict in (Verdict.KNOWN, Verdict.OPEN)


class _Knock(msgspec.Struct, frozen=True):
    """A request at the door, and whether it has taken its tokens: it knocks again when what was missing is there."""

    request: Request
    has_taken: bool


#: What nearly every request is told.
_PLAIN: Final = {verdict.value: Ruling(verdict) for verdict in Verdict}


@dataclass(frozen=True, slots=True)
class _Return:
    """A request that was let in and not recorded."""

    request: Request
    forget: bool


class Admission:
    """Judges requests by what Redis knows of their items, which it loads from Postgres where that is missing."""

    def __init__(self, engine: AsyncEngine, redis: Redis, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._settings = settings
        self.limits = limits_of(settings)
        #: The value of the header RateLimit-Policy; None while no limit is set.
        self.policy = policy_field(self.limits)
        self._seen_ms = int(settings.key_seen_ttl * 1000)
        bound = settings.accept_queue
        self._knocks: Group[_Knock, Ruling] = Group(self._judge, batch=_BATCH, bound=bound, every=_KNOCKS_EVERY)
        #: What was missing is there; they have waited already.
        self._knocks_again: Group[_Knock, Ruling] = Group(self._judge, batch=_BATCH, bound=bound)
        self._missing_items: Group[str, bool] = Group(self._load_items, batch=_BATCH, bound=bound)
        self._missing_counts: Group[str, bool] = Group(self._load_counts, batch=_BATCH, bound=bound)
        self._counting: dict[str, asyncio.Task[bool]] = {}
        self._returns: Group[_Return, None] = Group(self._take_back, batch=_BATCH)

    async def admit(self, request: Request) -> Ruling:
        """The door's ruling. Raises UnavailableError when Redis, or Postgres at need, does not answer.

        Whoever is let in (KNOWN or OPEN) and is then surely not recorded by its own commit calls `give_back`, once.
        """
        ruling = await self._knocks.bring(_Knock(request, has_taken=False))
        for _ in range(_LOADS):
            match ruling.verdict:
                case Verdict.UNKNOWN_ITEM:
                    # Never joins a load that began earlier: the item may have been created since.
                    exists = await self._missing_items.bring(request.item)
                case Verdict.NOT_COUNTED:
                    exists = await self._counted(request.item)
                case _:
                    return ruling
            if not exists:
                return Ruling(Verdict.UNKNOWN_ITEM, allowances=ruling.allowances)
            ruling = await self._knocks_again.bring(_Knock(request, has_taken=True))
        if ruling.verdict in (Verdict.UNKNOWN_ITEM, Verdict.NOT_COUNTED):
            raise UnavailableError("Redis keeps nothing")
        return ruling

    async def give_back(self, request: Request, *, forget: bool) -> None:
        """This request was let in and is surely not recorded by its own commit: it stands on no units any longer.

        The last that stood on the units of its key takes them off the count. With `forget` the key is new again then.
        Without, it stands for a purchase that existed already. Tokens are not given back. A failure is only logged: a
        count that is too high is counted anew.
        """
        try:
            await self._returns.bring(_Return(request, forget))
        except RedisError as error:
            log.warning("units_not_given_back", item=request.item, units=request.quantity, error=str(error))

    async def _judge(self, knocks: Sequence[_Knock]) -> list[Ruling]:
        names = [name for knock in knocks for name in self._names(knock.request)]
        args: list[str | int | float] = [self._seen_ms, doors.count_ttl_ms(self._settings), len(self.limits)]
        for limit in self.limits:
            args += (limit.whose, limit.interval, limit.burst)
        for knock in knocks:
            args += (knock.request.quantity, int(knock.has_taken))
        try:
            replies = await self._redis.eval(script("admit"), len(names), *names, *args)
        except RedisError as error:
            raise UnavailableError from error
        size = 2 + 2 * len(self.limits)
        return [self._ruling(replies[at : at + size]) for at in range(0, len(replies), size)]

    def _names(self, request: Request) -> Iterator[str]:
        yield keys.seen(request.client, request.key)
        yield keys.item(request.item)
        yield keys.waiting(request.item)
        for limit in self.limits:
            yield limit.bucket(request.client, request.customer)

    def _ruling(self, reply: Sequence[str | int]) -> Ruling:
        verdict, wait, *left = reply
        if not wait and not left:
            return _PLAIN[str(verdict)]
        allowances = tuple(
            Allowance(limit, int(tokens), int(full_in) / 1000)
            for limit, tokens, full_in in zip(self.limits, left[::2], left[1::2], strict=True)
        )
        return Ruling(Verdict(str(verdict)), int(wait) / 1000, allowances)

    async def _counted(self, sku: str) -> bool:
        """Whether the item exists; its waiting units are then counted. Whoever comes meanwhile joins: counting takes a
        moment where a crowd waits.
        """
        counting = self._counting.get(sku)
        if counting is None:
            counting = self._counting[sku] = asyncio.create_task(self._missing_counts.bring(sku))
            counting.add_done_callback(lambda done: self._forget_counting(sku, done))
        return await asyncio.shield(counting)

    def _forget_counting(self, sku: str, done: asyncio.Task[bool]) -> None:
        del self._counting[sku]
        if not done.cancelled():
            # Everybody who waited may be gone; an exception that nobody fetched would be reported as a defect.
            done.exception()

    async def _load_items(self, skus: Sequence[str]) -> list[bool]:
        """Per item, whether it exists; its door record is then written."""
        try:
            async with self._engine.connect() as connection:
                rows = (await connection.execute(sql.DOORS, {"skus": sorted(set(skus))})).mappings().all()
            found = [Door.from_row(row) for row in rows]
            async with self._redis.pipeline(transaction=False) as pipe:
                doors.queue_write(pipe, found, self._settings)
                await pipe.execute()
        except (DBAPIError, PoolTimeoutError, RedisError, OSError) as error:
            raise UnavailableError from error
        known = {door.sku for door in found}
        return [sku in known for sku in skus]

    async def _load_counts(self, skus: Sequence[str]) -> list[bool]:
        """Per item, whether it exists; its count is then written. A count is the longest statement of the door, so it
        runs within the limits of a transaction.
        """
        try:
            async with transaction(self._engine, self._settings) as connection:
                rows = (await connection.execute(sql.WAITING, {"skus": sorted(set(skus))})).mappings().all()
            counts = {row["sku"]: row["waiting"] for row in rows}
            async with self._redis.pipeline(transaction=False) as pipe:
                doors.queue_counts(pipe, counts, self._settings)
                await pipe.execute()
        except (DBAPIError, PoolTimeoutError, RedisError, OSError) as error:
            raise UnavailableError from error
        return [sku in counts for sku in skus]

    async def _take_back(self, returns: Sequence[_Return]) -> list[Exception | None]:
        names = [keys.seen(returned.request.client, returned.request.key) for returned in returns]
        args = [doors.count_ttl_ms(self._settings), *(int(returned.forget) for returned in returns)]
        await self._redis.eval(script("give_back"), len(names), *names, *args)
        return [None] * len(returns)
