"""The narrow lock: the only lock in Redis, around the one thing that must not happen twice, the payment call.

It says who is in. It does not say whose word counts: that is the fence, which comes from Postgres, because a counter
in Redis would start again with its data. A lock that was lost (expired, flushed, failed over) therefore costs at most
a refused outcome, never a wrong one.

- acquire: `SET lock owner NX PX ttl`; the same owner again is told "yours", as the reply to a first try can be lost.
- release and extend: compare the owner and act in one script, so nobody ends a newer owner's lock.
- the ttl outlasts the call's own deadline (checked with the settings), so a healthy call never loses its lock.
- renewing: for calls that have no short deadline. A lock that is lost all the same is told of once; the call that it
  guarded goes on, as nobody can take it back.

Locks are taken and released by the batch: one round trip for all that were claimed together.

For operators: the value of a lock is its owner, `host:pid:fence:…` around a call, `host:pid:ask:…` around a question.
`redis-cli GET fairlane:lock:charge:<purchase id>` shows who is in, and `PTTL` for how long still, unless it is renewed.
Whoever is refused logs whom it met (`lock_refused`). Deleting a lock stops no call; it only lets a second one begin.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.lock_metrics import LockMetrics
from shared.redis_clients import Pipeline, script

log = structlog.get_logger()

#: A lock is extended this many times in its life: two extensions may fail before it runs out.
_RENEWALS = 3
#: After an extension that got no answer, the next one comes after this part of a life: some more tries while it lasts.
_TRIES = 10


class Lock(msgspec.Struct, frozen=True):
    """One lock and who asks for it. `owner` is unique per try: the worker, its fence, and a nonce."""

    key: str
    owner: str


class NarrowLock:
    """Takes, extends and releases locks on one Redis. Every method raises redis.RedisError when it does not answer.

    `ttl` is in seconds. Those who take locks and those who release them share `metrics`, if holds are to be measured.
    """

    def __init__(self, client: Redis, ttl: float, metrics: LockMetrics | None = None) -> None:
        self._client = client
        self._ttl = ttl
        self._metrics = metrics or LockMetrics(ttl)

    async def acquire(self, locks: Sequence[Lock]) -> list[bool]:
        """Per lock, whether it is now the owner's."""
        asked_at = time.monotonic()
        obtained = []
        for lock, reply in zip(locks, await self._run("lock_acquire", locks), strict=True):
            obtained.append(reply == 1)
            if reply == 1:
                self._metrics.obtained(lock, asked_at)
            else:
                self._metrics.refused()
                log.info("lock_refused", lock=lock.key, asked=lock.owner, holder=reply)
        return obtained

    async def extend(self, locks: Sequence[Lock]) -> list[bool]:
        """Per lock, whether it still was the owner's and now lives for a whole ttl again."""
        asked_at = time.monotonic()
        extended = [reply == 1 for reply in await self._run("lock_extend", locks)]
        for lock, ours in zip(locks, extended, strict=True):
            if ours:
                self._metrics.extended(lock, asked_at)
        return extended

    async def release(self, locks: Sequence[Lock]) -> list[bool]:
        """Per lock, whether it was still the owner's and is now free."""
        if not locks:
            return []
        async with self._client.pipeline(transaction=False) as pipe:
            release = self.queue_release(pipe, locks)
            try:
                replies = await pipe.execute()
            except RedisError:
                release.failed()
                raise
        return release.read(replies)

    def queue_release(self, pipe: Pipeline, locks: Sequence[Lock]) -> Release:
        """Queue the release of these locks on a pipeline, and what was counted of locks so far.

        Whoever executes the pipeline says what came of it: `Release.read` or `Release.failed`.
        """
        believed = [self._metrics.letting_go(lock) for lock in locks]
        place = len(pipe)
        if locks:
            pipe.eval(
                script("delete_if_equal"), len(locks), *(lock.key for lock in locks), *(lock.owner for lock in locks)
            )
        return Release(self._metrics, locks, believed, place, self._metrics.queue(pipe))

    def abandon(self, locks: Sequence[Lock]) -> None:
        """Forget those of these locks that nobody will release: they are left to run out."""
        for lock in locks:
            self._metrics.abandon(lock)

    async def owner(self, key: str) -> str | None:
        """Who has this lock; None if nobody. True when it was read, and perhaps no more when it is looked at."""
        owner = await self._client.get(key)
        return None if owner is None else str(owner)

    async def tell(self) -> None:
        """Bring to Redis what was counted and found no pipeline to travel on. A failure is only logged."""
        if not self._metrics.pending:
            return
        async with self._client.pipeline(transaction=False) as pipe:
            counted = self._metrics.queue(pipe)
            try:
                await pipe.execute()
            except RedisError as error:
                self._metrics.put_back(counted)
                log.warning("lock_counts_not_told", error=str(error))

    @asynccontextmanager
    async def renewing(self, lock: Lock, on_lost: Callable[[Lock], None]) -> AsyncIterator[None]:
        """While the block runs, extend this lock, which was obtained before, three times per ttl.

        `on_lost` is called once, and renewing ends, when an extension says that the lock is gone or somebody else's, or
        when Redis has not answered for so long that the lock's life must be over. It must not raise. The block itself
        is never disturbed. A lock that is released within the block, counted by the same `LockMetrics`, is not lost.
        """
        over = asyncio.Event()
        renewal = asyncio.create_task(self._renew(lock, on_lost, over), name=f"renew-{lock.key}")
        try:
            yield
        finally:
            # Told as well as cancelled: Redis' client writes within `asyncio.wait_for`, which before Python 3.12 loses
            # a cancellation that comes when the write is just done. The lock would be renewed for ever.
            over.set()
            renewal.cancel()
            await asyncio.wait([renewal])
            if not renewal.cancelled() and (error := renewal.exception()):
                # What the block came to matters more than this.
                log.error("renewal_failed", lock=lock.key, exc_info=error)

    async def _renew(self, lock: Lock, on_lost: Callable[[Lock], None], over: asyncio.Event) -> None:
        pause = self._ttl / _RENEWALS
        while not over.is_set() and (lives_until := self._metrics.lives_until(lock)) is not None:
            await asyncio.sleep(min(pause, max(lives_until - time.monotonic(), 0)))
            try:
                # Also past its life: an answer says more than a clock.
                async with asyncio.timeout(max(lives_until - time.monotonic(), self._ttl / _TRIES)):
                    (ours,) = await self.extend([lock])
            except (RedisError, TimeoutError) as error:
                log.warning("lock_not_extended", lock=lock.key, error=str(error) or type(error).__name__)
                ours = time.monotonic() < lives_until
                pause = self._ttl / _TRIES
            else:
                pause = self._ttl / _RENEWALS
            if not ours:
                if self._metrics.lives_until(lock) is not None:  # not released by ourselves meanwhile
                    self._metrics.lost(lock)
                    on_lost(lock)
                return

    async def _run(self, name: str, locks: Sequence[Lock]) -> list[Any]:
        if not locks:
            return []
        replies: list[Any] = await self._client.eval(
            script(name),
            len(locks),
            *(lock.key for lock in locks),
            int(self._ttl * 1000),
            *(lock.owner for lock in locks),
        )
        return replies


class Release:
    """A release that was queued on a pipeline, until its reply is read."""

    def __init__(
        self,
        metrics: LockMetrics,
        locks: Sequence[Lock],
        believed: Sequence[bool],
        place: int,
        counted: Mapping[str, float],
    ) -> None:
        self._metrics = metrics
        self._locks = locks
        self._believed = believed
        self._place = place
        self._counted = counted

    def read(self, replies: Sequence[Any]) -> list[bool]:
        """Per lock, whether it was still the owner's and is now free, given all replies to the pipeline."""
        if not self._locks:
            return []
        released = [reply == 1 for reply in replies[self._place]]
        for lock, was_ours, believed in zip(self._locks, released, self._believed, strict=True):
            if believed and not was_ours:
                self._metrics.lost_at_release()
                log.warning("lock_lost", lock=lock.key, owner=lock.owner)
        return released

    def failed(self) -> None:
        """The pipeline failed: the locks may be free or not, and run out in any case; the counts travel again."""
        self._metrics.put_back(self._counted)
