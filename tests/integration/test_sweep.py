"""The sweep on real servers: it finds what was forgotten, calls it, and does nothing else."""

from __future__ import annotations

import asyncio

import structlog.testing

from shared import keys
from shared.routing import queues
from shared.statements import sweep as sql
from shared.statuses import WATERMARK_TTL
from tests.integration.shopfloor import Shop, until
from workers.gateways import Confirmed, Declined
from workers.record import Result
from workers.sweep import Sweep, Swept


def sweep(shop: Shop) -> Sweep:
    return Sweep(shop.engine, shop.redis, shop.caller, shop.settings)


def called(shop: Shop) -> dict[str, int]:
    """How many messages lie in each queue that has some."""
    return {queue: found for queue in queues(shop.settings.lanes) if (found := len(shop.messages(queue)))}


async def test_with_nothing_to_do_nobody_is_called(shop: Shop) -> None:
    await shop.item()
    swept = await sweep(shop).run_once()

    assert (swept.ours, swept.lanes, swept.charges_due) == (True, (), False)
    assert called(shop) == {}


async def test_a_forgotten_lane_is_called_once(shop: Shop) -> None:
    saved = await shop.item()
    await shop.buy(shop.order())
    shop.forget_calls()
    swept = [await sweep(shop).run_once() for _ in range(2)]

    assert [each.lanes for each in swept] == [(saved.lane,)] * 2
    assert called(shop) == {f"lane.{saved.lane:02d}": 1}


async def test_a_lane_that_nobody_comes_to_is_called_again_though_its_mark_stands(shop: Shop) -> None:
    saved = await shop.item()
    await shop.buy(shop.order())

    assert await heard(shop, sweep(shop), f"lane.{saved.lane:02d}", rounds=5) == [False, True, True, True, True]


async def test_a_lane_that_somebody_has_locked_collects_no_workers(shop: Shop) -> None:
    """Whoever hears of it waits for the lock: two are enough, the second if the first call was swallowed."""
    saved = await shop.item()
    await shop.buy(shop.order())
    one, queue = sweep(shop), f"lane.{saved.lane:02d}"
    with shop.holding("SELECT FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE", saved.lane):
        assert await heard(shop, one, queue, rounds=6) == [False, True, False, True, False, False]

    # The frozen one lost its lock: now somebody must come, and soon.
    assert await heard(shop, one, queue, rounds=1) == [True]


async def heard(shop: Shop, one: Sweep, queue: str, rounds: int) -> list[bool]:
    """Whether each of these rounds calls, while every call is taken by a worker that dies or freezes with it."""
    calls = []
    for _ in range(rounds):
        shop.plain_redis.delete(queue)
        assert shop.called(queue)
        await one.run_once()
        calls.append(len(shop.messages(queue)) == 1)
    return calls


async def test_a_lane_that_moves_is_not_called_again_while_its_mark_stands(shop: Shop) -> None:
    saved = await shop.item()
    first, _ = await shop.buy_one_by_one(shop.order(), shop.order())
    one = sweep(shop)
    await one.run_once()
    shop.sql("UPDATE fairlane.purchases SET status = 'needs_review' WHERE id = %s", first.id)
    shop.plain_redis.delete(f"lane.{saved.lane:02d}")
    await one.run_once()

    assert shop.called(f"lane.{saved.lane:02d}")
    assert called(shop) == {}


async def test_holds_that_are_due_are_called_for(shop: Shop) -> None:
    await shop.item()
    await shop.hold(shop.order())
    shop.forget_calls()

    assert (await sweep(shop).run_once()).charges_due
    assert called(shop) == {"charges": 1}


async def test_the_charges_are_called_again_when_nobody_came_though_their_mark_stands(shop: Shop) -> None:
    await shop.item()
    await shop.hold(shop.order())

    assert await heard(shop, sweep(shop), "charges", rounds=5) == [False, True, False, True, False]


async def test_holds_that_are_not_due_yet_or_ran_out_are_not_called_for(shop: Shop) -> None:
    await shop.item()
    later, over = await shop.hold(shop.order(), shop.order())
    shop.sql("UPDATE fairlane.purchases SET due_at = now() + interval '1 h' WHERE id = %s", later.id)
    shop.sql("UPDATE fairlane.purchases SET expires_at = now() WHERE id = %s", over.id)
    shop.forget_calls()

    assert not (await sweep(shop).run_once()).charges_due
    assert called(shop) == {}


async def test_a_waitlist_that_cannot_move_is_left_alone(shop: Shop) -> None:
    await shop.item(stock=1)
    (held, _) = await shop.hold(shop.order(), shop.order())
    await shop.claim()
    shop.forget_calls()

    assert (await sweep(shop).run_once()).lanes == ()
    assert shop.status(held) == "charging"
    assert called(shop) == {}


async def test_a_waitlist_that_can_be_served_is_called_for(shop: Shop) -> None:
    saved = await shop.item(stock=1)
    await shop.hold(shop.order(), shop.order())
    (claim,) = await shop.claim()
    await shop.recorder().record([Result.of(claim, Declined("no_money"))])
    shop.forget_calls()

    assert (await sweep(shop).run_once()).lanes == (saved.lane,)
    assert called(shop) == {f"lane.{saved.lane:02d}": 1}


async def test_a_waitlist_that_can_never_be_served_is_called_for(shop: Shop) -> None:
    saved = await shop.item(stock=1)
    await shop.hold(shop.order(), shop.order())
    (claim,) = await shop.claim()
    await shop.recorder().record([Result.of(claim, Confirmed("ch_1"))])
    shop.forget_calls()

    assert (await sweep(shop).run_once()).lanes == (saved.lane,)


async def test_a_waitlist_that_was_turned_off_is_called_for(shop: Shop) -> None:
    saved = await shop.item(stock=1)
    await shop.hold(shop.order(), shop.order())
    await shop.claim()
    await shop.item(stock=1, waitlist=False)
    shop.forget_calls()

    assert (await sweep(shop).run_once()).lanes == (saved.lane,)


async def test_every_lane_and_item_with_work_is_found_at_once(shop: Shop) -> None:
    lanes = set()
    for number in range(40):
        saved = await shop.item(f"sku-{number}", stock=1)
        lanes.add(saved.lane)
    await shop.hold(*(shop.order(f"sku-{number}") for number in range(40) for _ in range(2)))
    claims = await shop.claim()
    await shop.recorder().record([Result.of(claim, Declined("no_money")) for claim in claims])
    shop.forget_calls()

    assert set((await sweep(shop).run_once()).lanes) == lanes


async def test_one_sweep_works_at_a_time(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    shop.forget_calls()
    with shop.holding("SELECT pg_advisory_xact_lock(%s)", sql.SWEEP_LOCK):
        assert await sweep(shop).run_once() == Swept(ours=False)
        assert shop.plain_redis.keys("*") == []

    assert (await sweep(shop).run_once()).ours  # and nobody has to be elected


async def test_an_item_that_somebody_keeps_does_not_keep_the_holds_of_others_from_ending(shop: Shop) -> None:
    await shop.item()
    await shop.item("sku-2")
    kept, other = await shop.hold(shop.order(), shop.order("sku-2"))
    shop.sql("UPDATE fairlane.purchases SET expires_at = now()")
    with shop.holding("SELECT FROM fairlane.items WHERE sku = 'sku-1' FOR NO KEY UPDATE"):
        swept = await Sweep(shop.engine, shop.redis, shop.caller, shop.with_settings(lock_timeout=0.2)).run_once()
        assert [record.id for record in swept.expired] == [other.id]
        assert (shop.status(kept), shop.stock("sku-2")) == ("reserved", (10, 0, 0))

    assert [record.id for record in (await sweep(shop).run_once()).expired] == [kept.id]
    assert shop.stock() == (10, 0, 0)


async def test_watermarks_are_written_again_after_a_flush(shop: Shop) -> None:
    saved = await shop.item()
    (bought,) = await shop.hold(shop.order())
    shop.forget_calls()
    await sweep(shop).run_once()

    written = {lane: shop.plain_redis.get(keys.decided(lane)) for lane in range(shop.settings.lanes)}
    assert written.pop(saved.lane) == str(bought.seq)
    assert set(written.values()) == {"0"}


async def test_a_watermark_that_nobody_can_write_any_more_is_soon_gone(shop: Shop) -> None:
    saved = await shop.item()
    await sweep(shop).run_once()
    left = shop.plain_redis.pttl(keys.decided(saved.lane))
    assert 0 < left <= WATERMARK_TTL * 1000
    # Every round begins it anew.
    shop.plain_redis.pexpire(keys.decided(saved.lane), left // 2)
    await sweep(shop).run_once()
    assert shop.plain_redis.pttl(keys.decided(saved.lane)) > left // 2


async def test_without_redis_a_round_ends_in_peace(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    swept = await Sweep(shop.engine, shop.redis_that_is_down(), shop.caller, shop.settings).run_once()

    assert len(swept.lanes) == 1


async def test_the_loop_goes_on_after_a_round_that_failed_until_it_is_told_to_stop(shop: Shop) -> None:
    saved = await shop.item()
    await shop.buy(shop.order())
    shop.forget_calls()
    shop.sql("ALTER TABLE fairlane.lanes RENAME TO elsewhere")
    stop = asyncio.Event()
    looping = asyncio.create_task(
        Sweep(shop.engine, shop.redis, shop.caller, shop.with_settings(sweep_every=0.01)).run(stop)
    )
    with structlog.testing.capture_logs() as logs:
        await until(lambda: any(entry["event"] == "sweep_failed" for entry in logs))
    shop.sql("ALTER TABLE fairlane.elsewhere RENAME TO lanes")
    await until(lambda: called(shop) == {f"lane.{saved.lane:02d}": 1})
    stop.set()
    async with asyncio.timeout(20):
        await looping
