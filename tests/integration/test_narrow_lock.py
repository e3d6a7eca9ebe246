"""The narrow lock on a real server: who is in, and that nobody ends a lock that is not theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog.testing

from shared.lock_metrics import LockMetrics
from shared.narrow_lock import Lock, NarrowLock
from tests.integration.shopfloor import Shop, until

OURS = Lock("fairlane:lock:charge:a", "worker-1:1")
THEIRS = Lock("fairlane:lock:charge:a", "worker-2:2")
OTHER = Lock("fairlane:lock:charge:b", "worker-1:3")

#: Long enough never to run out within a test, and short enough to see that a life was counted anew.
TTL = 30.0


def ttl_of(shop: Shop, lock: Lock) -> float:
    return float(shop.plain_redis.pttl(lock.key)) / 1000


async def test_a_free_lock_is_taken_for_its_ttl(shop: Shop) -> None:
    assert await NarrowLock(shop.redis, TTL).acquire([OURS]) == [True]

    assert shop.plain_redis.get(OURS.key) == OURS.owner
    assert 0 < ttl_of(shop, OURS) <= TTL


async def test_somebody_else_is_refused_while_it_is_held(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])

    assert await lock.acquire([THEIRS]) == [False]
    assert shop.plain_redis.get(OURS.key) == OURS.owner


async def test_the_same_owner_again_is_told_yours_and_gets_a_whole_new_life(shop: Shop) -> None:
    # The reply to a first try can be lost: the owner must not lock itself out.
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])
    shop.plain_redis.pexpire(OURS.key, 5_000)

    assert await lock.acquire([OURS]) == [True]
    assert ttl_of(shop, OURS) > 5


async def test_being_refused_does_not_lengthen_the_other_owners_lock(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])
    shop.plain_redis.pexpire(OURS.key, 5_000)
    await lock.acquire([THEIRS])

    assert ttl_of(shop, OURS) <= 5


async def test_only_its_owner_releases_it(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])

    assert await lock.release([THEIRS]) == [False]
    assert shop.plain_redis.get(OURS.key) == OURS.owner
    assert await lock.release([OURS]) == [True]
    assert await lock.acquire([THEIRS]) == [True]


async def test_releasing_what_is_gone_changes_nothing(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])
    await lock.release([OURS])

    assert await lock.release([OURS]) == [False]


async def test_only_its_owner_extends_it(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])
    shop.plain_redis.pexpire(OURS.key, 5_000)

    assert await lock.extend([THEIRS]) == [False]
    assert ttl_of(shop, OURS) <= 5
    assert await lock.extend([OURS]) == [True]
    assert ttl_of(shop, OURS) > 5


async def test_a_lock_that_was_lost_is_not_brought_back_by_extending_it(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])
    shop.plain_redis.flushall()

    assert await lock.extend([OURS]) == [False]
    assert not shop.plain_redis.exists(OURS.key)


async def test_a_lock_whose_ttl_ran_out_is_free(shop: Shop) -> None:
    await NarrowLock(shop.redis, 0.02).acquire([OURS])
    await until(lambda: not shop.plain_redis.exists(OURS.key))

    assert await NarrowLock(shop.redis, TTL).acquire([THEIRS]) == [True]


async def test_a_batch_is_answered_lock_by_lock(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    await lock.acquire([OURS])

    assert await lock.acquire([THEIRS, OTHER]) == [False, True]
    assert await lock.extend([THEIRS, OTHER]) == [False, True]
    assert await lock.release([THEIRS, OTHER, OURS]) == [False, True, True]


async def test_an_empty_batch_asks_nobody(shop: Shop) -> None:
    lock = NarrowLock(shop.redis_that_is_down(), TTL)

    assert [await lock.acquire([]), await lock.extend([]), await lock.release([])] == [[], [], []]


async def test_anybody_can_see_who_has_a_lock(shop: Shop) -> None:
    lock = NarrowLock(shop.redis, TTL)
    assert await lock.owner(OURS.key) is None
    await lock.acquire([OURS])
    with structlog.testing.capture_logs() as logs:
        await lock.acquire([THEIRS])

    assert await lock.owner(OURS.key) == OURS.owner
    assert [(entry["event"], entry["holder"]) for entry in logs] == [("lock_refused", OURS.owner)]


class TestRenewing:
    async def test_a_lock_is_kept_for_longer_than_its_life(self, shop: Shop) -> None:
        lost: list[Lock] = []
        lock = NarrowLock(shop.redis, 1.0)
        await lock.acquire([OURS])
        async with lock.renewing(OURS, lost.append):
            await one_life(shop, lock)  # of a lock that nobody renews, obtained later
            assert shop.plain_redis.get(OURS.key) == OURS.owner
        assert lost == []
        await until(lambda: not shop.plain_redis.exists(OURS.key))  # with the block, renewing ended

    async def test_a_lock_that_is_gone_is_told_of_once(self, shop: Shop) -> None:
        assert await self.lost_after(shop, lambda: shop.plain_redis.delete(OURS.key)) == [OURS]
        assert not shop.plain_redis.exists(OURS.key)

    async def test_a_lock_that_somebody_else_has_now_is_told_of_once(self, shop: Shop) -> None:
        assert await self.lost_after(shop, lambda: shop.plain_redis.set(OURS.key, THEIRS.owner, px=60_000)) == [OURS]
        assert shop.plain_redis.get(OURS.key) == THEIRS.owner

    async def test_a_redis_that_is_silent_for_a_whole_life_has_lost_it(self, shop: Shop) -> None:
        lost: list[Lock] = []
        metrics = LockMetrics(0.3)
        await NarrowLock(shop.redis, 0.3, metrics).acquire([OURS])
        async with NarrowLock(shop.redis_that_is_down(), 0.3, metrics).renewing(OURS, lost.append):
            await until(lambda: bool(lost))
            await one_life(shop, NarrowLock(shop.redis, 0.3))
        assert lost == [OURS]

    async def test_a_redis_that_hangs_is_not_waited_for_longer_than_a_life(self, shop: Shop) -> None:
        lost: list[Lock] = []
        lock = NarrowLock(shop.redis, 0.3)
        await lock.acquire([OURS])
        with structlog.testing.capture_logs() as logs:
            async with lock.renewing(OURS, lost.append):
                shop.plain_redis.client_pause(900)  # less than REDIS_TIMEOUT, which would end the wait as well
                await until(lambda: bool(lost))
        assert lost == [OURS]
        assert {entry["error"] for entry in logs if entry["event"] == "lock_not_extended"} == {"TimeoutError"}

    async def test_a_redis_that_is_silent_for_less_has_not(self, shop: Shop) -> None:
        lost: list[Lock] = []
        lock = NarrowLock(shop.redis, 3.0)
        await lock.acquire([OURS])
        with structlog.testing.capture_logs() as logs:
            async with lock.renewing(OURS, lost.append):
                shop.plain_redis.client_kill_filter(_id=str(await shop.redis.client_id()))
                await until(lambda: "lock_not_extended" in {entry["event"] for entry in logs})
                before = shop.plain_redis.pttl(OURS.key)
                await until(lambda: shop.plain_redis.pttl(OURS.key) > before)  # the next try extended it
        assert lost == []

    async def test_a_lock_that_is_released_meanwhile_is_not_lost(self, shop: Shop) -> None:
        class Late(NarrowLock):
            extended = 0

            async def extend(self, locks: Sequence[Lock]) -> list[bool]:
                await self.release(locks)  # by its owner, while the extension is on its way
                self.extended += 1
                return await super().extend(locks)

        lost: list[Lock] = []
        lock = Late(shop.redis, 0.3)
        await lock.acquire([OURS])
        async with lock.renewing(OURS, lost.append):
            await until(lambda: lock.extended == 1)
            await one_life(shop, lock)
        assert (lost, lock.extended) == ([], 1)

    async def test_it_ends_with_the_block_even_if_redis_client_swallows_the_cancellation(self, shop: Shop) -> None:
        class Deaf(NarrowLock):
            """As on Python 3.11, where `asyncio.wait_for` returns its result instead."""

            extending = 0

            async def extend(self, locks: Sequence[Lock]) -> list[bool]:
                self.extending += 1
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
                return await super().extend(locks)

        lock = Deaf(shop.redis, 3.0)
        await lock.acquire([OURS])
        async with asyncio.timeout(30), lock.renewing(OURS, lambda _: None):
            await until(lambda: lock.extending == 1)
        assert lock.extending == 1

    async def lost_after(self, shop: Shop, fault: Callable[[], object]) -> list[Lock]:
        """What `on_lost` was told in more than a life after the fault; the block ran to its end."""
        lost: list[Lock] = []
        lock = NarrowLock(shop.redis, 0.3)
        await lock.acquire([OURS])
        async with lock.renewing(OURS, lost.append):
            fault()
            await until(lambda: bool(lost))
            await one_life(shop, lock)
        return lost


async def one_life(shop: Shop, lock: NarrowLock) -> None:
    """Return when a lock that nobody renews was obtained and has run out."""
    assert await lock.acquire([OTHER]) == [True]
    await until(lambda: not shop.plain_redis.exists(OTHER.key))
