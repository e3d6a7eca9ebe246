"""The narrow lock on a real server: who is in, and that nobody ends a lock that is not theirs."""

from __future__ import annotations

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
