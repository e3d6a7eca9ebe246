"""Deciding on a real Postgres, by one decider and by many: who gets stock, in which order, and that nobody is left."""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import structlog.testing

from producers.accept import Order
from shared import keys, statuses
from shared.purchases import PurchaseRecord
from shared.routing import lane_of
from shared.settings import Settings
from shared.statements import accept
from tests.integration.shopfloor import Shop, until
from workers import verdicts
from workers.decide import Decider, Drained, LaneTakenError
from workers.gateways import Confirmed, Declined
from workers.record import Result

HOUR = timedelta(hours=1)

#: Longer than any test holds a lock: who waits, waits.
PATIENT = {
    "lock_timeout": 60.0,
    "idle_in_transaction_timeout": 60.0,
    "statement_timeout": 60.0,
    "connection_timeout": 90.0,
}


def lane(sku: str = "sku-1") -> int:
    return lane_of(sku, 16)


def queue(sku: str = "sku-1") -> str:
    return f"lane.{lane(sku):02d}"


def neighbours(number: int) -> list[str]:
    """Items that share one lane."""
    names = (f"n-{n}" for n in range(1_000_000))
    return [name for name in names if lane(name) == 0][:number]


def drain(shop: Shop, sku: str = "sku-1", settings: Settings | None = None) -> Drained:
    with shop.decider(settings or shop.with_settings(decide_slice=60)) as decider:
        return decider.drain(lane(sku))


async def record(shop: Shop, outcome: Confirmed | Declined, *purchases: PurchaseRecord) -> None:
    """What came of the payment calls of these purchases, after a claim of all that is due."""
    wanted = {purchase.id for purchase in purchases}
    claims = [claim for claim in await shop.claim() if claim.record.id in wanted]
    assert len(claims) == len(purchases)
    await shop.recorder().record([Result.of(claim, outcome) for claim in claims])


def decide_with_eight(shop: Shop, settings: Settings) -> list[Drained]:
    """Eight deciders, each on connections of its own, come to the lane again and again, for a batch each time."""

    def come_and_go(_: int) -> list[Drained]:
        with shop.decider(settings) as decider:
            return [decider.drain(lane()) for _ in range(12)]

    with ThreadPoolExecutor(8) as threads:
        return [drained for each in threads.map(come_and_go, range(8)) for drained in each]


async def test_eight_deciders_give_a_hundred_units_to_the_first_hundred_of_a_thousand(shop: Shop) -> None:
    await shop.item(stock=100, waitlist=False)
    records = await shop.buy(*(shop.order() for _ in range(1_000)))
    drained = await asyncio.to_thread(decide_with_eight, shop, shop.with_settings(decide_batch=40, decide_slice=0.001))

    assert shop.statuses() == ["reserved"] * 100 + ["sold_out"] * 900
    assert [row["id"].hex for row in shop.purchases()] == [record.id for record in records]
    assert shop.stock() == (0, 100, 0)
    assert {row["rev"] for row in shop.purchases()} == {2}  # each decided once
    assert sum(each.decided for each in drained) == 1_000
    assert sum(each.reserved for each in drained) == 100
    assert sum(each.decided > 0 for each in drained) > 1  # several had their turn, or this proves little


async def test_eight_deciders_decide_mixed_quantities_as_one_would(shop: Shop) -> None:
    chance = random.Random(20_260_131)
    await shop.item(stock=500, waitlist=False)
    quantities = [chance.randint(1, 9) for _ in range(600)]
    await shop.buy(*(shop.order(quantity=quantity) for quantity in quantities))
    await asyncio.to_thread(decide_with_eight, shop, shop.with_settings(decide_batch=25, decide_slice=0.001))

    left, expected = 500, []
    for quantity in quantities:
        expected.append("reserved" if quantity <= left else "sold_out")
        left -= quantity if quantity <= left else 0
    assert shop.statuses() == expected
    assert shop.stock() == (left, 500 - left, 0)


async def test_a_decided_purchase_has_its_hold_and_its_times(shop: Shop) -> None:
    await shop.item(stock=1, waitlist=False, hold_seconds=120)
    await shop.buy(shop.order(), shop.order())
    assert drain(shop).decided == 2

    held, refused = shop.purchases()
    assert (held["status"], refused["status"]) == ("reserved", "sold_out")
    assert held["due_at"] == held["decided_at"]
    assert held["expires_at"] - held["decided_at"] == timedelta(seconds=120)
    assert held["payment_token"] == "tok_secret"
    assert (refused["reason"], refused["payment_token"]) == ("sold_out", None)
    assert refused["decided_at"] == refused["finished_at"]


async def test_what_falls_back_goes_to_the_first_on_the_waitlist_before_a_newcomer(shop: Shop) -> None:
    await shop.item(stock=1)
    first, second, third = await shop.hold(shop.order(), shop.order(), shop.order())
    assert shop.statuses() == ["reserved", "waitlisted", "waitlisted"]

    await record(shop, Declined("no_money"), first)
    (newcomer,) = await shop.buy(shop.order())
    drain(shop)

    assert [shop.status(each) for each in (first, second, third, newcomer)] == [
        "declined",
        "reserved",
        "waitlisted",
        "waitlisted",
    ]
    assert shop.stock() == (0, 1, 0)


async def test_a_declined_hold_calls_the_lane_of_those_who_wait_for_it(shop: Shop) -> None:
    await shop.item(stock=1)
    first, _ = await shop.hold(shop.order(), shop.order())
    shop.forget_calls()
    await record(shop, Declined("no_money"), first)

    assert len(shop.messages(queue())) == 1


async def test_when_the_last_hold_is_paid_the_waitlist_finds_it_sold_out(shop: Shop) -> None:
    await shop.item(stock=1)
    first, second = await shop.hold(shop.order(), shop.order())
    await record(shop, Confirmed("ch_1"), first)
    drain(shop)

    assert shop.status(second) == "sold_out"
    assert shop.stock() == (0, 0, 1)


async def test_a_smaller_request_does_not_pass_a_bigger_one_of_the_same_batch(shop: Shop) -> None:
    await shop.item(stock=3)
    await shop.hold(*(shop.order(quantity=quantity) for quantity in (2, 2, 1)))

    assert shop.statuses() == ["reserved", "waitlisted", "waitlisted"]
    assert shop.stock() == (1, 2, 0)


async def test_a_smaller_request_does_not_pass_a_bigger_one_that_waits_already(shop: Shop) -> None:
    await shop.item(stock=3)
    one, _, big, small = await shop.hold(*(shop.order(quantity=quantity) for quantity in (1, 2, 2, 1)))
    assert shop.statuses() == ["reserved", "reserved", "waitlisted", "waitlisted"]

    await record(shop, Declined("no_money"), one)  # one unit is back: enough for the small one only
    (newcomer,) = await shop.buy(shop.order())
    drain(shop)

    assert [shop.status(each) for each in (big, small, newcomer)] == ["waitlisted"] * 3
    assert shop.stock() == (1, 2, 0)


async def test_a_newcomer_does_not_pass_the_part_of_a_waitlist_that_is_not_in_the_batch(shop: Shop) -> None:
    await shop.item(stock=2)
    await shop.hold(*(shop.order() for _ in range(12)))
    await shop.item(stock=5)  # three more
    newcomers = await shop.buy(*(shop.order() for _ in range(3)))
    with shop.decider(shop.with_settings(decide_batch=2)) as decider:
        decider.run_batch(lane(), wait=True)
        assert shop.statuses()[:5] == ["reserved"] * 4 + ["waitlisted"]
        decider.drain(lane())

    assert shop.statuses() == ["reserved"] * 5 + ["waitlisted"] * 10
    assert [shop.status(each) for each in newcomers] == ["waitlisted"] * 3


async def test_a_blocked_waitlist_hides_no_other_item_of_its_lane(shop: Shop) -> None:
    blocked, moving, fresh = neighbours(3)
    for sku in (blocked, moving):
        await shop.item(sku, stock=1)
    await shop.item(fresh, stock=1)
    await shop.buy(*(shop.order(blocked) for _ in range(601)))
    await shop.buy(*(shop.order(moving) for _ in range(3)))
    drain(shop, blocked)
    assert shop.statuses().count("waitlisted") == 602
    await shop.item(moving, stock=2)
    (newcomer,) = await shop.buy(shop.order(fresh))
    drained = drain(shop, blocked, shop.with_settings(decide_batch=10, decide_slice=60))

    assert drained.decided == 2  # nothing of the blocked waitlist was read again
    assert shop.status(newcomer) == "reserved"
    assert shop.stock(moving) == (0, 2, 0)


async def test_a_waitlist_that_was_turned_off_finds_it_sold_out(shop: Shop) -> None:
    await shop.item(stock=1)
    _, second = await shop.hold(shop.order(), shop.order())
    await shop.item(stock=1, waitlist=False)
    drain(shop)

    assert shop.status(second) == "sold_out"


async def test_a_customer_gets_no_more_than_one_customer_may_have(shop: Shop) -> None:
    await shop.item(stock=100, per_customer=3)
    orders = [shop.order(customer="c", quantity=quantity) for quantity in (2, 2, 1, 1)]
    await shop.hold(*orders, shop.order(customer="d", quantity=3), shop.order(customer="c", client="other", quantity=3))

    assert shop.statuses() == ["reserved", "limit_reached", "reserved", "limit_reached", "reserved", "reserved"]


async def test_the_limit_counts_what_earlier_batches_gave_sold_or_unpaid_and_not_what_was_declined(
    shop: Shop,
) -> None:
    await shop.item(stock=100, per_customer=2)
    first, second = await shop.hold(shop.order(customer="c"), shop.order(customer="c"))
    await record(shop, Confirmed("ch_1"), first, second)
    (third,) = await shop.hold(shop.order(customer="c"))
    assert shop.status(third) == "limit_reached"

    (declined,) = await shop.hold(shop.order(customer="d", quantity=2))
    await record(shop, Declined("no_money"), declined)
    (again,) = await shop.hold(shop.order(customer="d", quantity=2))
    assert shop.status(again) == "reserved"


async def test_opening_hours_are_judged_by_when_it_was_accepted(shop: Shop) -> None:
    now = datetime.now(UTC)
    await shop.item(opens_at=now - HOUR, closes_at=now + HOUR)
    early, inside, late = await shop.buy(shop.order(), shop.order(), shop.order())
    for purchase, accepted_at in ((early, now - 2 * HOUR), (late, now + HOUR)):
        shop.sql("UPDATE fairlane.purchases SET accepted_at = %s WHERE id = %s", accepted_at, purchase.id)
    await shop.item(opens_at=now - HOUR, closes_at=now + HOUR)
    drain(shop)

    assert [shop.status(each) for each in (early, inside, late)] == ["cancelled", "reserved", "cancelled"]
    assert shop.purchase(early)["reason"] == "not_on_sale"


async def test_a_lane_that_is_taken_is_called_again_and_left(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    with shop.holding("SELECT FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE", lane()):
        shop.forget_calls()
        shop.plain_redis.set(keys.called(queue()), "who called us", px=600_000)
        drained = await asyncio.to_thread(drain, shop, "sku-1", shop.with_settings(lock_timeout=0.05))

    assert (drained.decided, drained.left) == (0, True)
    assert len(shop.messages(queue())) == 1
    assert shop.called(queue())
    assert shop.statuses() == ["queued"]


async def test_the_first_batch_waits_for_its_lane(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    with shop.holding("SELECT FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE", lane()) as somebody:
        draining = asyncio.create_task(asyncio.to_thread(drain, shop, "sku-1", shop.with_settings(**PATIENT)))
        await shop.someone_waits_for_a_lock()
        assert shop.called(queue())  # the mark is deleted after the lock was granted, not before
        (late,) = await shop.buy(shop.order())
        somebody.rollback()
        drained = await draining

    assert drained.decided == 2
    assert shop.status(late) == "reserved"


async def test_who_waits_for_a_lane_behind_another_waits_no_longer_than_that_one(shop: Shop) -> None:
    await shop.item()
    settings = shop.with_settings(lock_timeout=2.0)

    def wait() -> float:
        with shop.decider(settings) as decider:
            with pytest.raises(LaneTakenError):
                decider.run_batch(lane(), wait=False)  # connects
            began = time.monotonic()
            with pytest.raises(LaneTakenError):
                decider.run_batch(lane(), wait=True)
            return time.monotonic() - began

    with shop.holding("SELECT FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE", lane()):
        first = asyncio.create_task(asyncio.to_thread(wait))
        await shop.someone_waits_for_a_lock()
        await asyncio.sleep(0.3)  # so that the first one's time is surely up first, and the second takes its place
        second = asyncio.create_task(asyncio.to_thread(wait))
        waits = await asyncio.gather(first, second)

    # Postgres lets one wait for the holder and the others for that one; each is a wait with a limit of its own.
    assert waits[1] < 1.5 * waits[0], waits


async def test_a_later_batch_does_not_wait_for_a_lane_that_somebody_else_took(shop: Shop) -> None:
    await shop.item()
    with (
        shop.holding("SELECT FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE", lane()),
        shop.decider(shop.with_settings(**PATIENT)) as decider,
    ):
        async with asyncio.timeout(20):
            with pytest.raises(LaneTakenError):
                await asyncio.to_thread(decider.run_batch, lane(), wait=False)

    assert not shop.messages(queue())  # whoever has it carries on


async def test_a_lane_of_which_somebody_keeps_a_row_too_long_is_called_again_also_in_a_later_batch(shop: Shop) -> None:
    free, kept = neighbours(2)
    for sku in (free, kept):
        await shop.item(sku)
    await shop.buy(shop.order(free), shop.order(kept))
    shop.forget_calls()
    settings = shop.with_settings(decide_batch=1, lock_timeout=0.05, decide_slice=60)
    with shop.holding("SELECT FROM fairlane.items WHERE sku = %s FOR NO KEY UPDATE", kept):
        drained = await asyncio.to_thread(drain, shop, free, settings)

    assert shop.statuses() == ["reserved", "queued"]
    assert (drained.decided, drained.left) == (1, True)
    assert len(shop.messages(queue(free))) == 1


async def test_the_mark_is_deleted_before_the_line_is_read_so_later_work_calls_again(shop: Shop) -> None:
    await shop.item()
    (early,) = await shop.buy(shop.order())
    with (
        shop.holding("SELECT FROM fairlane.purchases WHERE id = %s FOR NO KEY UPDATE", early.id) as somebody,
        shop.decider(shop.with_settings(**PATIENT)) as decider,
    ):
        deciding = asyncio.create_task(asyncio.to_thread(decider.run_batch, lane(), wait=True))
        await shop.someone_waits_for_a_lock()  # in the middle of reading the line
        assert not shop.called(queue())
        shop.plain_redis.delete(queue())  # the message that brought the decider here
        (late,) = await shop.buy(shop.order())
        somebody.rollback()
        batch = await deciding

    assert [record.id for record in batch.records] == [early.id]
    assert shop.status(late) == "queued"
    assert shop.called(queue())
    assert len(shop.messages(queue())) == 1


async def test_stock_that_somebody_is_changing_is_decided_as_it_stands_afterwards(shop: Shop) -> None:
    await shop.item(stock=10, waitlist=False)
    await shop.buy(*(shop.order() for _ in range(3)))
    less = "UPDATE fairlane.items SET stock = 1, available = 1, rev = rev + 1"
    with shop.holding(less) as somebody:
        deciding = asyncio.create_task(asyncio.to_thread(drain, shop, "sku-1", shop.with_settings(**PATIENT)))
        await shop.someone_waits_for_a_lock()
        somebody.commit()
        await deciding

    assert shop.statuses() == ["reserved", "sold_out", "sold_out"]
    assert shop.stock() == (0, 1, 0)


async def test_a_lane_whose_slice_of_time_is_over_is_called_again(shop: Shop) -> None:
    await shop.item(stock=100)
    await shop.buy(*(shop.order() for _ in range(30)))
    shop.forget_calls()
    drained = drain(shop, "sku-1", shop.with_settings(decide_batch=1, decide_slice=0.001))

    assert drained.decided < 30
    assert drained.left
    assert len(shop.messages(queue())) == 1


async def test_a_decider_that_is_to_stop_gives_the_lane_up_between_batches(shop: Shop) -> None:
    await shop.item(stock=100)
    await shop.buy(*(shop.order() for _ in range(30)))
    shop.forget_calls()
    with shop.decider(shop.with_settings(decide_batch=10, decide_slice=3_600)) as decider:
        drained = decider.drain(lane(), stopping=lambda: True)

    assert (drained.decided, drained.left) == (10, True)
    assert len(shop.messages(queue())) == 1


async def test_a_purchase_that_cannot_be_decided_is_set_aside_and_stops_no_other(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.item()
    before, broken, after = await shop.buy(shop.order(), shop.order(customer="breaks"), shop.order())
    monkeypatch.setattr("workers.verdicts._verdict", failing_for("breaks"))
    with structlog.testing.capture_logs() as logs:
        drain(shop)

    assert [shop.status(each) for each in (before, broken, after)] == ["reserved", "needs_review", "reserved"]
    row = shop.purchase(broken)
    assert (row["reason"], row["decided_at"], row["payment_token"]) == ("undecidable", None, "tok_secret")
    assert shop.stock() == (8, 2, 0)
    assert [entry["purchase"] for entry in logs if entry["event"] == "purchase_set_aside"] == [broken.id]


async def test_a_purchase_that_postgres_refuses_is_set_aside_and_stops_no_other(shop: Shop) -> None:
    await shop.item()
    other = next(f"sku-{n}" for n in range(2, 500) if lane(f"sku-{n}") == lane())
    await shop.item(other)
    # Somebody changed the books by hand: every change of this item breaks the rule now.
    shop.sql("ALTER TABLE fairlane.items DROP CONSTRAINT never_oversold")
    shop.sql("UPDATE fairlane.items SET available = 99 WHERE sku = %s", other)
    shop.sql("ALTER TABLE fairlane.items ADD CONSTRAINT never_oversold CHECK (available + unpaid <= stock) NOT VALID")
    orders = [shop.order(other if n == 40 else "sku-1", customer=f"c-{n}") for n in range(60)]
    bought = await shop.buy(*orders)
    await shop.item(stock=60)
    with structlog.testing.capture_logs() as logs:
        drain(shop)

    statuses = [shop.status(each) for each in bought]
    assert statuses.pop(40) == "needs_review"
    assert set(statuses) == {"reserved"}
    assert shop.stock() == (1, 59, 0)
    assert shop.stock(other) == (99, 0, -89)
    assert "batch_refused" in {entry["event"] for entry in logs}


def failing_for(customer: str) -> object:
    """The rule for one purchase, but for one customer a defect in it."""
    rule = verdicts._verdict

    def verdict(purchase: verdicts.Waiting, *rest: object) -> verdicts.Verdict:
        if purchase.customer == customer:
            raise ZeroDivisionError
        return rule(purchase, *rest)  # type: ignore[arg-type]

    return verdict


async def test_what_a_dead_decider_had_not_committed_is_decided_by_the_next(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    with (
        shop.holding("SELECT FROM fairlane.items WHERE sku = 'sku-1' FOR NO KEY UPDATE"),
        shop.decider(shop.with_settings(**PATIENT)) as decider,
    ):
        dying = asyncio.create_task(asyncio.to_thread(decider.drain, lane()))
        await shop.someone_waits_for_a_lock()
        shop.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with pytest.raises(Exception, match="terminat"):
            await dying
    assert shop.statuses() == ["queued"]

    assert drain(shop).decided == 1
    assert shop.stock() == (9, 1, 0)


async def test_a_decider_that_stalls_in_its_transaction_loses_the_lane(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    with shop.decider(shop.with_settings(idle_in_transaction_timeout=0.2, redis_timeout=0.1)) as decider:
        stalled = StalledDecider(decider)
        with pytest.raises(Exception, match="idle-in-transaction"):
            await asyncio.to_thread(stalled.run, lane(), shop)

    assert stalled.saw_the_lane_free
    assert shop.statuses() == ["queued"]
    assert drain(shop).decided == 1


class StalledDecider:
    """A decider that stands still between its lock and its read, until Postgres has ended its transaction."""

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self.saw_the_lane_free = False

    def run(self, lane: int, shop: Shop) -> None:
        forget = self._decider._forget_call

        def stall(lane: int) -> None:
            forget(lane)
            while shop.sql(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND state LIKE 'idle in transaction%'"
            ):
                pass
            shop.sql("SELECT lane FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE NOWAIT", lane)
            self.saw_the_lane_free = True

        self._decider._forget_call = stall  # type: ignore[method-assign]
        self._decider.run_batch(lane, wait=True)


async def test_the_watermark_is_the_last_place_looked_at_and_never_falls(shop: Shop) -> None:
    await shop.item(stock=100)
    records = await shop.buy(*(shop.order() for _ in range(20)))
    with shop.decider(shop.with_settings(decide_batch=5)) as decider:
        batch = decider.run_batch(lane(), wait=True)
        assert batch.decided_through == records[4].seq
        decider.drain(lane())
    shop.sql("UPDATE fairlane.purchases SET seq = 0 WHERE id = %s", records[0].id)
    (late,) = await shop.buy(shop.order())
    shop.sql("UPDATE fairlane.purchases SET seq = -1 WHERE id = %s", late.id)  # committed after its place was passed
    drain(shop)

    assert shop.status(late) == "reserved"
    (row,) = shop.sql("SELECT decided_through FROM fairlane.lanes WHERE lane = %s", lane())
    assert row["decided_through"] == records[-1].seq


async def test_after_a_batch_redis_knows_the_statuses_the_door_the_watermark_and_the_charges_are_called(
    shop: Shop,
) -> None:
    await shop.item(stock=1, waitlist=False)
    held, refused = await shop.buy(shop.order(), shop.order())
    drain(shop)

    written = [str(shop.plain_redis.get(keys.purchase(each.id))) for each in (held, refused)]
    assert ['"status":"reserved"' in written[0], '"status":"sold_out"' in written[1]] == [True, True]
    assert "tok_secret" not in "".join(written)
    door = shop.plain_redis.hgetall(keys.item("sku-1"))
    assert (door["rev"], door["within_reach"]) == ("2", "0")
    assert shop.plain_redis.get(keys.decided(lane())) == str(refused.seq)
    assert len(shop.messages("charges")) == 1


async def test_of_every_verdict_redis_has_what_postgres_has(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records are made of the rows as they were read and of the verdicts, and never read again."""
    await shop.item(stock=3, per_customer=2)
    closed, *_ = await shop.buy(
        shop.order(customer="late"),
        shop.order(customer="c", quantity=2),
        shop.order(customer="c"),
        shop.order(customer="breaks"),
        shop.order(quantity=2),
        shop.order(quantity=4),
    )
    shop.sql("UPDATE fairlane.purchases SET accepted_at = %s WHERE id = %s", datetime.now(UTC) - HOUR, closed.id)
    await shop.item(stock=3, per_customer=2, opens_at=datetime.now(UTC) - HOUR / 2)
    monkeypatch.setattr("workers.verdicts._verdict", failing_for("breaks"))
    drain(shop)
    met = {"cancelled", "reserved", "limit_reached", "needs_review", "waitlisted"}
    assert set(shop.statuses()) == met
    await compare_with_postgres(shop)

    # And one that waited before, with its first decision.
    await shop.item(stock=20, per_customer=2)
    drain(shop)
    assert set(shop.statuses()) == met - {"waitlisted"}
    await shop.item("none", stock=0, waitlist=False)
    await shop.buy(shop.order("none"))
    drain(shop, "none")
    assert shop.statuses()[-1] == "sold_out"
    await compare_with_postgres(shop)


async def compare_with_postgres(shop: Shop) -> None:
    ids = [row["id"].hex for row in shop.purchases()]
    async with shop.engine.connect() as connection:
        rows = (await connection.execute(accept.BY_ID, {"ids": ids})).mappings().all()
    cached = await statuses.read_many(shop.redis, ids, shop.settings.lanes)
    written = {each.record.id: each.record for each in cached if each is not None}
    assert written == {row["id"]: PurchaseRecord.from_row(row) for row in rows}


async def test_a_batch_that_reserved_nothing_calls_no_charges(shop: Shop) -> None:
    await shop.item(stock=0)
    await shop.hold(shop.order())

    assert shop.statuses() == ["sold_out"]
    assert shop.messages("charges") == []


async def test_without_redis_a_lane_is_decided_all_the_same(shop: Shop) -> None:
    await shop.item()
    await shop.buy(shop.order())
    drained = drain(shop, "sku-1", shop.with_settings(redis_url="redis://127.0.0.1:9/0"))

    assert (drained.decided, shop.statuses()) == (1, ["reserved"])


async def test_an_item_of_another_lane_is_left_alone(shop: Shop) -> None:
    await shop.item("sku-1")
    other = next(f"sku-{n}" for n in range(2, 100) if lane(f"sku-{n}") != lane())
    await shop.item(other)
    orders: list[Order] = [shop.order(), shop.order(other)]
    await shop.buy(*orders)
    drain(shop)

    assert shop.statuses() == ["reserved", "queued"]
    await until(lambda: bool(shop.messages(queue(other))))
