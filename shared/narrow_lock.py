"""The narrow lock: the only lock in Redis, around the one thing that must not happen twice, the payment call.

It says who is in. It does not say whose word counts: that is the fence, which comes from Postgres, because a counter
in Redis would start again with its data. A lock that was lost (expired, flushed, failed over) therefore costs at most
a refused outcome, never a wrong one.

- acquire: `SET lock owner NX PX ttl`; the same owner again is told "yours", as the reply to a first try can be lost.
- release and extend: compare the owner and act in one script, so nobody ends a newer owner's lock.
- the ttl outlasts the call's own deadline (checked with the settings), so a healthy call never loses its lock.

Locks are taken and released by the batch: one round trip for all that were claimed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from shared.redis_clients import script


@dataclass(frozen=True, slots=True)
class Lock:
    """One lock and who asks for it. `owner` is unique per try: the worker and its fence."""

    key: str
    owner: str


class NarrowLock:
    """Takes, extends and releases locks on one Redis. Every method raises redis.RedisError when it does not answer."""

    def __init__(self, client: Redis, ttl: float) -> None:
        self._client = client
        self._ttl_ms = int(ttl * 1000)

    async def acquire(self, locks: Sequence[Lock]) -> list[bool]:
        """Per lock, whether it is now the owner's."""
        return await self._run("lock_acquire", locks, self._ttl_ms)

    async def extend(self, locks: Sequence[Lock]) -> list[bool]:
        """Per lock, whether it still was the owner's and now lives for a whole ttl again."""
        return await self._run("lock_extend", locks, self._ttl_ms)

    async def release(self, locks: Sequence[Lock]) -> list[bool]:
        """Per lock, whether it was still the owner's and is now free."""
        return await self._run("delete_if_equal", locks)

    async def _run(self, name: str, locks: Sequence[Lock], *ttl: int) -> list[bool]:
        if not locks:
            return []
        replies = await self._client.eval(
            script(name), len(locks), *(lock.key for lock in locks), *ttl, *(lock.owner for lock in locks)
        )
        return [reply == 1 for reply in replies]
