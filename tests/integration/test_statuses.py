"""Statuses in Redis and how far they are believed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from producers.reading import Reader, Reading
from shared import keys, statuses
from shared.errors import UnavailableError
from shared.purchases import PurchaseRecord
from shared.states import FINAL, Status
from shared.statuses import CachedStatus
from tests.integration.shopfloor import NOBODY_LISTENS, Shop

FRESH = 2.0


def record(status: Status = Status.QUEUED, **changes: object) -> PurchaseRecord:
    base = PurchaseRecord(
        id="a" * 32,
        client="shop",
        seq=50,
        lane=3,
        rev=5,
        status=status,
        item="sku-1",
        quantity=1,
        customer="c-1",
        amount=500,
        currency="EUR",
        accepted_at="2026-01-31T09:00:00.000000Z",
    )
    return msgspec.structs.replace(base, **changes)


async def write(shop: Shop, records: Sequence[PurchaseRecord]) -> None:
    async with shop.redis.pipeline(transaction=False) as pipe:
        statuses.queue_write(pipe, records, shop.settings)
        await pipe.execute()


async def read(shop: Shop, purchase_id: str = "a" * 32) -> CachedStatus | None:
    (found,) = await statuses.read_many(shop.redis, [purchase_id], shop.settings.lanes)
    return found


async def test_what_was_written_is_read(shop: Shop) -> None:
    written = record(Status.CONFIRMED, charge_id="ch_1", finished_at="2026-01-31T09:00:01.000000Z")
    await write(shop, [written])
    shop.plain_redis.set(keys.decided(3), 77)

    found = await read(shop)
    assert found is not None
    assert (found.record, found.decided_through) == (written, 77)
    assert 0 <= found.age < 20
    assert 0 < shop.plain_redis.pttl(keys.purchase("a" * 32)) <= shop.settings.status_ttl * 1000


async def test_a_newer_revision_replaces_an_older_one(shop: Shop) -> None:
    await write(shop, [record(rev=9)])
    await write(shop, [record(Status.RESERVED, rev=10)])  # compared as numbers: as text, 10 would be less than 9

    found = await read(shop)
    assert found is not None
    assert found.record.rev == 10


async def test_an_older_revision_never_overwrites_a_newer_one(shop: Shop) -> None:
    await write(shop, [record(Status.RESERVED, rev=10)])
    await write(shop, [record(rev=9)])

    found = await read(shop)
    assert found is not None
    assert found.record.status is Status.RESERVED


async def test_a_batch_is_compared_purchase_by_purchase(shop: Shop) -> None:
    await write(shop, [record(rev=9)])
    await write(shop, [record(rev=8, reason="older"), record(id="b" * 32, rev=1)])

    first, second, third = await statuses.read_many(shop.redis, ["a" * 32, "b" * 32, "c" * 32], shop.settings.lanes)
    assert first is not None
    assert second is not None
    assert (first.record.rev, second.record.id, third) == (9, "b" * 32, None)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_a_final_status_is_always_believed(status: Status) -> None:
    assert CachedStatus(record(status), age=3_000, decided_through=None).believable(FRESH)
    assert CachedStatus(record(status), age=3_000, decided_through=100).believable(FRESH)


@pytest.mark.parametrize(
    ("status", "age", "decided_through", "believed"),
    [
        # Queued beyond the watermark: nobody has looked at it yet, but it may have been cancelled some time ago.
        (Status.QUEUED, 30.0, 49, True),
        (Status.QUEUED, 30.1, 49, False),
        # Queued at or below it is a contradiction, however young.
        (Status.QUEUED, 0.0, 50, False),
        (Status.QUEUED, 0.0, 51, False),
        # No watermark: only its age counts.
        (Status.QUEUED, 2.0, None, True),
        (Status.QUEUED, 2.1, None, False),
        # Everything else may have changed meanwhile, and the watermark says nothing of it.
        (Status.WAITLISTED, 2.0, 49, True),
        (Status.WAITLISTED, 2.1, 49, False),
        (Status.RESERVED, 2.0, 100, True),
        (Status.RESERVED, 2.1, 100, False),
        (Status.CHARGING, 2.1, 100, False),
        (Status.IN_DOUBT, 2.1, 100, False),
        (Status.NEEDS_REVIEW, 2.1, 100, False),
    ],
)
def test_a_status_that_may_change_is_believed_while_nothing_speaks_against_it(
    status: Status, age: float, decided_through: int | None, believed: bool
) -> None:
    assert CachedStatus(record(status), age, decided_through).believable(FRESH) is believed


async def test_a_believable_status_is_answered_without_postgres(shop: Shop) -> None:
    await write(shop, [record()])
    shop.plain_redis.set(keys.decided(3), 40)
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))

    assert await Reader(nowhere, shop.redis, shop.settings).read("a" * 32) == Reading(record(), 40)


async def test_a_status_that_contradicts_the_watermark_is_mended_from_postgres(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    shop.sql("UPDATE fairlane.purchases SET status = 'waitlisted', rev = 2 WHERE id = %s", bought.id)
    shop.sql("UPDATE fairlane.lanes SET decided_through = %s WHERE lane = %s", bought.seq, bought.lane)
    shop.plain_redis.set(keys.decided(bought.lane), bought.seq)

    reading = await Reader(shop.engine, shop.redis, shop.settings).read(bought.id)
    assert reading is not None
    assert (reading.record.status, reading.decided_through) == (Status.WAITLISTED, bought.seq)
    mended = await read(shop, bought.id)
    assert mended is not None
    assert mended.record == reading.record


async def test_a_status_that_is_gone_is_read_from_postgres_and_written_again(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    shop.plain_redis.flushall()

    reading = await Reader(shop.engine, shop.redis, shop.settings).read(bought.id)
    assert reading is not None
    assert reading.record == bought
    assert shop.plain_redis.exists(keys.purchase(bought.id))


async def test_without_redis_postgres_answers(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())

    reading = await Reader(shop.engine, shop.redis_that_is_down(), shop.settings).read(bought.id)
    assert reading is not None
    assert reading.record == bought


async def test_without_redis_and_postgres_nobody_can_tell(shop: Shop) -> None:
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))
    reader = Reader(nowhere, shop.redis_that_is_down(), shop.with_settings(redis_url=NOBODY_LISTENS))

    with pytest.raises(UnavailableError):
        await reader.read("a" * 32)


async def test_a_purchase_that_does_not_exist_is_none(shop: Shop) -> None:
    assert await Reader(shop.engine, shop.redis, shop.settings).read("f" * 32) is None


@pytest.mark.parametrize(
    ("status", "seq", "decided_through", "position"),
    [
        (Status.QUEUED, 50, 40, 10),
        (Status.QUEUED, 50, 60, 1),
        (Status.QUEUED, 50, None, None),
        (Status.RESERVED, 50, 40, None),
    ],
)
def test_a_position_is_told_only_while_queued(
    status: Status, seq: int, decided_through: int | None, position: int | None
) -> None:
    assert Reading(record(status, seq=seq), decided_through).position == position


async def test_a_status_written_by_another_version_is_left_to_postgres(shop: Shop) -> None:
    await shop.item()
    strange, known = await shop.buy(shop.order(), shop.order())
    shop.plain_redis.set(keys.purchase(strange.id), '9|0|{"status": "teleported"}')
    found = await statuses.read_many(shop.redis, [strange.id, known.id], shop.settings.lanes)
    assert found[0] is None
    assert found[1] is not None
    assert found[1].record.id == known.id
