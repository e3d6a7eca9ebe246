"""Cancelling on real servers: what may be called off is, what may have been sent is not, and nobody loses a unit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import structlog.testing
from redis import Redis

from producers.cancel import Cancellation, Cancelled, Canceller, TooLate, UnknownPurchase
from producers.reading import Reader
from shared import keys
from shared.crash_points import armed
from shared.errors import UnavailableError
from shared.purchases import PurchaseRecord
from shared.routing import queue_of
from shared.statements import cancel as cancel_sql
from shared.statements import charge as charge_sql
from shared.states import Reason, Status, may_follow
from shared.statuses import read_many
from tests.integration.http_calls import ADMIN, SHOP, Answer, assert_problem, call
from tests.integration.shopfloor import BOUND, Shop, accepted
from workers.gateways import Confirmed, InDoubt, NotSent
from workers.record import NotCharged, Recorded, Result

OTHER = {"Authorization": "Bearer other-secret"}

#: Longer than any test holds a lock: who waits, waits.
PATIENT = {
    "lock_timeout": 60.0,
    "idle_in_transaction_timeout": 60.0,
    "statement_timeout": 60.0,
    "connection_timeout": 90.0,
}

KEPT_PURCHASE = "SELECT FROM fairlane.purchases WHERE id = %s FOR NO KEY UPDATE"
KEPT_ITEM = "SELECT FROM fairlane.items WHERE sku = %s FOR NO KEY UPDATE"


async def cancel(shop: Shop, record: PurchaseRecord, canceller: Canceller | None = None) -> Cancellation:
    """Cancel this purchase, and wait until whoever is to be called was called."""
    canceller = canceller or shop.canceller()
    cancellation = await canceller.cancel(record.client, record.id)
    await canceller.close()
    return cancellation


def patient(shop: Shop) -> Canceller:
    settings = shop.with_settings(**PATIENT)
    return shop.canceller(settings, engine=shop.another_engine(settings))


def row_of_item(shop: Shop) -> dict[str, Any]:
    (row,) = shop.sql("SELECT * FROM fairlane.items WHERE sku = 'sku-1'")
    return row


async def in_state(shop: Shop, status: Status) -> PurchaseRecord:
    """A purchase of two units that waits or holds; of five units, three are held by somebody else."""
    await shop.item(stock=5)
    if status is Status.QUEUED:
        await shop.hold(shop.order(quantity=3))
        (record,) = await shop.buy(shop.order(quantity=2))
    elif status is Status.WAITLISTED:
        _, record = await shop.hold(shop.order(quantity=4), shop.order(quantity=2))
    else:
        _, record = await shop.hold(shop.order(quantity=3), shop.order(quantity=2))
    assert shop.status(record) == status
    shop.plain_redis.delete(queue_of(record.lane), keys.called(queue_of(record.lane)))
    return record


@pytest.mark.parametrize(
    ("status", "stock", "calls"),
    [
        (Status.QUEUED, (2, 3, 0), 0),
        (Status.WAITLISTED, (1, 4, 0), 1),
        (Status.RESERVED, (2, 3, 0), 1),
    ],
)
async def test_what_waits_or_holds_is_cancelled(
    shop: Shop, status: Status, stock: tuple[int, int, int], calls: int
) -> None:
    bought = await in_state(shop, status)
    before, item = shop.purchase(bought), row_of_item(shop)

    cancelled = await cancel(shop, bought)

    row = shop.purchase(bought)
    assert isinstance(cancelled, Cancelled)
    assert (cancelled.before, cancelled.record.rev) == (status, row["rev"])
    assert (row["status"], row["reason"], row["rev"]) == ("cancelled", Reason.CANCELLED_BY_CLIENT, before["rev"] + 1)
    assert (row["payment_token"], row["due_at"], row["decided_at"]) == (None, None, before["decided_at"])
    assert row["finished_at"] is not None
    assert shop.stock() == stock
    assert row_of_item(shop)["rev"] == item["rev"] + (status is Status.RESERVED)
    assert len(shop.messages(queue_of(bought.lane))) == calls


@pytest.mark.parametrize("status", [Status.QUEUED, Status.WAITLISTED, Status.RESERVED])
async def test_redis_knows_before_the_answer(shop: Shop, status: Status) -> None:
    bought = await in_state(shop, status)
    canceller = shop.canceller()
    cancelled = await canceller.cancel(bought.client, bought.id)

    assert isinstance(cancelled, Cancelled)
    (cached,) = await read_many(shop.redis, [bought.id], shop.settings.lanes)
    assert cached is not None
    assert cached.record == cancelled.record
    if status is Status.RESERVED:
        door = shop.plain_redis.hgetall(keys.item("sku-1"))
        item = row_of_item(shop)
        assert (int(door["rev"]), int(door["within_reach"])) == (item["rev"], item["available"] + item["unpaid"])


@pytest.mark.parametrize(("status", "units"), [(Status.QUEUED, 5), (Status.WAITLISTED, 5), (Status.RESERVED, 7)])
async def test_what_waits_no_longer_makes_room_at_the_door(shop: Shop, status: Status, units: int) -> None:
    """Once. What is held was taken off when it was decided."""
    bought = await in_state(shop, status)
    shop.plain_redis.set(keys.waiting("sku-1"), 7)
    for _ in range(2):
        await cancel(shop, bought)
    assert int(shop.plain_redis.get(keys.waiting("sku-1")) or 0) == units


@pytest.mark.parametrize("status", [Status.QUEUED, Status.RESERVED])
async def test_cancelled_again_is_cancelled_and_moves_nothing(shop: Shop, status: Status) -> None:
    bought = await in_state(shop, status)
    first = await cancel(shop, bought)
    before = shop.purchase(bought), row_of_item(shop)
    shop.forget_calls()

    again = await cancel(shop, bought)

    assert isinstance(first, Cancelled)
    assert again == Cancelled(first.record)
    assert (shop.purchase(bought), row_of_item(shop)) == before
    # Whoever cancelled it may have died before Redis was told.
    assert shop.plain_redis.exists(keys.purchase(bought.id))


#: What a claimed purchase is made into.
TOO_LATE: Mapping[Status, str] = {
    Status.CHARGING: "status = 'charging'",
    Status.IN_DOUBT: "status = 'in_doubt', doubt_since = now(), ask_at = now()",
    Status.NEEDS_REVIEW: "status = 'needs_review'",
    Status.CONFIRMED: "status = 'confirmed', charge_id = 'ch', finished_at = now(), payment_token = NULL",
    **{
        status: f"status = '{status}', finished_at = now(), payment_token = NULL"
        for status in (Status.DECLINED, Status.SOLD_OUT, Status.LIMIT_REACHED, Status.EXPIRED)
    },
}


def test_every_other_state_is_too_late() -> None:
    assert TOO_LATE.keys() == {s for s in Status if not may_follow(s, Status.CANCELLED)} - {Status.CANCELLED}


@pytest.mark.parametrize("status", TOO_LATE)
async def test_what_is_settled_or_may_have_been_sent_stays_as_it_is(shop: Shop, status: Status) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    await shop.claim()
    shop.sql(f"UPDATE fairlane.purchases SET {TOO_LATE[status]}")
    before = shop.purchase(bought), row_of_item(shop)

    answer = await cancel(shop, bought)

    assert isinstance(answer, TooLate)
    assert answer.record.status is status
    assert (shop.purchase(bought), row_of_item(shop)) == before


async def test_who_comes_too_late_waits_for_nobody(shop: Shop) -> None:
    """Also so that the outcome of a purchase is not passed over because its buyer tries to cancel it."""
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    await shop.claim()
    with shop.holding(KEPT_PURCHASE, bought.id):
        assert isinstance(await cancel(shop, bought, shop.canceller(shop.with_settings(lock_timeout=0.05))), TooLate)


async def test_what_was_sent_perhaps_is_too_late_to_cancel_and_a_charge_that_shows_up_finds_it(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order(quantity=2))
    (claim,) = await shop.claim()
    recorder = shop.recorder()
    await recorder.record([Result.of(claim, InDoubt("timeout"))])
    for outcome in (NotCharged(again=True), Confirmed("ch_late")):
        result = Result(bought.id, claim.fence, claim.attempt, claim.lock, outcome)
        assert await recorder.record([result]) == [Recorded.COUNTED]
        assert isinstance(await cancel(shop, bought), TooLate)

    assert (shop.statuses(), shop.stock()) == (["confirmed"], (8, 0, 2))


async def test_what_was_surely_not_sent_can_be_cancelled(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order(quantity=2))
    (claim,) = await shop.claim()
    result = Result(bought.id, claim.fence, claim.attempt, claim.lock, NotSent("too_late"))
    assert await shop.recorder().record([result]) == [Recorded.COUNTED]

    assert isinstance(await cancel(shop, bought), Cancelled)

    assert (shop.statuses(), shop.stock()) == (["cancelled"], (10, 0, 0))
    shop.sql("UPDATE fairlane.purchases SET expires_at = now() - interval '1 second'")
    assert await shop.claim() == []
    assert (await shop.sweep().run_once()).expired == ()


# Races: both orders, with the locks of the real statements


async def test_a_claim_that_came_first_is_too_late_to_cancel(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    values = {"slots": 10, "worker": "w", "overdue_after": 20.0}
    async with shop.another_engine().connect() as claiming:
        assert len((await claiming.execute(charge_sql.CLAIM, values)).all()) == 1
        cancelling = asyncio.create_task(cancel(shop, bought, patient(shop)))
        await shop.someone_waits_for_a_lock()
        await claiming.commit()
        answer = await cancelling
    assert isinstance(answer, TooLate)
    assert answer.record.status is Status.CHARGING
    assert (shop.statuses(), shop.stock()) == (["charging"], (9, 1, 0))


async def test_a_claim_that_was_undone_is_not(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    values = {"slots": 10, "worker": "w", "overdue_after": 20.0}
    async with shop.another_engine().connect() as claiming:
        await claiming.execute(charge_sql.CLAIM, values)
        cancelling = asyncio.create_task(cancel(shop, bought, patient(shop)))
        await shop.someone_waits_for_a_lock()
        await claiming.rollback()
        assert isinstance(await cancelling, Cancelled)
    assert (shop.statuses(), shop.stock(), shop.attempts()) == (["cancelled"], (10, 0, 0), [])


async def test_what_is_being_cancelled_is_not_claimed(shop: Shop) -> None:
    """It has its purchase, and waits for the item: the one lock order."""
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    with shop.holding(KEPT_ITEM, "sku-1") as somebody:
        cancelling = asyncio.create_task(cancel(shop, bought, patient(shop)))
        await shop.someone_waits_for_a_lock()
        assert await shop.claim() == []
        with pytest.raises(psycopg.errors.LockNotAvailable):
            shop.sql("SELECT FROM fairlane.purchases FOR NO KEY UPDATE NOWAIT")
        somebody.rollback()
        assert isinstance(await cancelling, Cancelled)
    assert await shop.claim() == []
    assert (shop.statuses(), shop.stock()) == (["cancelled"], (10, 0, 0))


async def test_a_hold_that_ran_out_while_it_is_cancelled_gives_its_units_back_once(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    shop.sql("UPDATE fairlane.purchases SET expires_at = now() - interval '1 second'")
    with shop.holding(KEPT_ITEM, "sku-1") as somebody:
        cancelling = asyncio.create_task(cancel(shop, bought, patient(shop)))
        await shop.someone_waits_for_a_lock()
        assert (await shop.sweep().run_once()).expired == ()
        somebody.rollback()
        assert isinstance(await cancelling, Cancelled)
    assert (await shop.sweep().run_once()).expired == ()
    assert (shop.statuses(), shop.stock()) == (["cancelled"], (10, 0, 0))


async def test_a_purchase_that_is_just_being_decided_is_cancelled_as_what_it_becomes(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    decided, go_on = threading.Event(), threading.Event()

    def stop_there(point: str) -> None:
        if point == "decide.before_commit":
            decided.set()
            assert go_on.wait(BOUND)

    with armed(stop_there), shop.decider(shop.with_settings(**PATIENT)) as decider:
        deciding = asyncio.create_task(asyncio.to_thread(decider.run_batch, bought.lane, wait=True))
        assert await asyncio.to_thread(decided.wait, BOUND)
        cancelling = asyncio.create_task(cancel(shop, bought, patient(shop)))
        await shop.someone_waits_for_a_lock()
        go_on.set()
        assert (await deciding).reserved == 1
        cancelled = await cancelling
    assert isinstance(cancelled, Cancelled)
    assert cancelled.before is Status.RESERVED
    assert (shop.statuses(), shop.stock()) == (["cancelled"], (10, 0, 0))


async def test_a_purchase_that_is_being_cancelled_is_not_decided(shop: Shop) -> None:
    await shop.item(stock=1)
    first, second = await shop.buy(shop.order(), shop.order())
    values = {"id": first.id, "client": "shop"}
    async with shop.another_engine().connect() as cancelling:
        assert len((await cancelling.execute(cancel_sql.LOCK, values)).all()) == 1
        assert len((await cancelling.execute(cancel_sql.CANCEL, values)).all()) == 1
        with shop.decider(shop.with_settings(**PATIENT)) as decider:
            deciding = asyncio.create_task(asyncio.to_thread(decider.drain, first.lane))
            await shop.someone_waits_for_a_lock()
            await cancelling.commit()
            await deciding
    assert [shop.status(first), shop.status(second)] == ["cancelled", "reserved"]


async def test_two_who_cancel_at_once_give_the_units_back_once(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order(quantity=3))
    with shop.holding(KEPT_PURCHASE, bought.id) as somebody:
        both = [asyncio.create_task(cancel(shop, bought, patient(shop))) for _ in range(2)]
        await shop.someone_waits_for_a_lock(sessions=2)
        somebody.rollback()
        answers = await asyncio.gather(*both)
    assert sorted(str(answer.before) for answer in answers if isinstance(answer, Cancelled)) == ["None", "reserved"]
    assert shop.stock() == (10, 0, 0)


# Who moves up


async def test_a_unit_that_is_given_up_goes_to_the_first_who_waits(shop: Shop) -> None:
    await shop.item(stock=1)
    holder, first, second = await shop.hold(shop.order(), shop.order(), shop.order())
    shop.forget_calls()
    await cancel(shop, holder)
    assert len(shop.messages(queue_of(holder.lane))) == 1
    with shop.decider() as decider:
        decider.drain(holder.lane)
    assert [shop.status(each) for each in (holder, first, second)] == ["cancelled", "reserved", "waitlisted"]
    assert shop.stock() == (0, 1, 0)


async def test_whoever_waits_behind_a_bigger_request_moves_up_when_that_is_cancelled(shop: Shop) -> None:
    await shop.item(stock=3)
    _, bigger, smaller = await shop.hold(shop.order(quantity=2), shop.order(quantity=2), shop.order())
    assert shop.statuses() == ["reserved", "waitlisted", "waitlisted"]
    shop.forget_calls()
    await cancel(shop, bigger)
    assert len(shop.messages(queue_of(bigger.lane))) == 1
    with shop.decider() as decider:
        decider.drain(bigger.lane)
    assert (shop.status(smaller), shop.stock()) == ("reserved", (0, 3, 0))


async def test_a_customer_may_buy_again_after_cancelling(shop: Shop) -> None:
    await shop.item(per_customer=1)
    (bought,) = await shop.hold(shop.order(customer="ann"))
    await cancel(shop, bought)
    (again,) = await shop.hold(shop.order(customer="ann"))
    assert shop.status(again) == "reserved"


# Whose it is


@pytest.mark.parametrize("whose", ["other", "none"])
async def test_what_is_not_the_clients_own_is_unknown(shop: Shop, whose: str) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    before = shop.purchase(bought)
    client, purchase = ("other", bought.id) if whose == "other" else ("shop", uuid4().hex)
    assert await shop.canceller().cancel(client, purchase) == UnknownPurchase()
    assert shop.purchase(bought) == before


# Without a part


async def test_without_redis_it_is_cancelled_and_the_sweep_calls_whoever_waits(shop: Shop) -> None:
    await shop.item(stock=1)
    holder, first = await shop.hold(shop.order(), shop.order())
    shop.forget_calls()
    down = shop.redis_that_is_down()
    with structlog.testing.capture_logs() as logs:
        assert isinstance(await cancel(shop, holder, shop.canceller(client=down)), Cancelled)
    assert [entry["event"] for entry in logs] == ["cancelled_not_published"]
    reading = await Reader(shop.engine, down, shop.settings).read(holder.id)
    assert reading is not None
    assert reading.record.status is Status.CANCELLED

    assert (await shop.sweep().run_once()).lanes == (holder.lane,)
    with shop.decider() as decider:
        decider.drain(holder.lane)
    assert shop.status(first) == "reserved"


async def test_without_postgres_nobody_knows(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    nowhere = shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing")
    with pytest.raises(UnavailableError):
        await cancel(shop, bought, shop.canceller(nowhere, engine=shop.another_engine(nowhere)))
    assert shop.statuses() == ["queued"]


@pytest.mark.parametrize("kept", [KEPT_PURCHASE, KEPT_ITEM])
async def test_a_lock_that_does_not_come_changes_nothing(shop: Shop, kept: str) -> None:
    await shop.item()
    (bought,) = await shop.hold(shop.order())
    canceller = shop.canceller(shop.with_settings(lock_timeout=0.05))
    with shop.holding(kept, bought.id if kept is KEPT_PURCHASE else "sku-1"):
        with pytest.raises(UnavailableError):
            await cancel(shop, bought, canceller)
        assert (shop.statuses(), shop.stock()) == (["reserved"], (9, 1, 0))
    assert isinstance(await cancel(shop, bought, canceller), Cancelled)


async def test_those_who_wait_for_a_lock_leave_connections_for_orders(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    settings = shop.with_settings(**PATIENT, database_pool=2)
    engine = shop.another_engine(settings)
    canceller, acceptor = shop.canceller(settings, engine=engine), shop.acceptor(settings, engine)
    with shop.holding(KEPT_PURCHASE, bought.id) as somebody:
        cancelling = [asyncio.create_task(canceller.cancel("shop", bought.id)) for _ in range(3)]
        await shop.someone_waits_for_a_lock()
        accepted(await asyncio.wait_for(acceptor.accept(shop.order()), BOUND))
        somebody.rollback()
        answers = await asyncio.gather(*cancelling)
    assert [isinstance(answer, Cancelled) for answer in answers] == [True] * 3


async def test_nobody_waits_long_for_a_turn(shop: Shop) -> None:
    await shop.item()
    (bought,) = await shop.buy(shop.order())
    settings = shop.with_settings(lock_timeout=0.05, database_pool=2)
    canceller = shop.canceller(settings, engine=shop.another_engine(shop.with_settings(database_pool=2)))
    with shop.holding(KEPT_PURCHASE, bought.id):
        attempts = (canceller.cancel("shop", bought.id) for _ in range(20))
        answers = await asyncio.gather(*attempts, return_exceptions=True)
    assert all(isinstance(answer, UnavailableError) for answer in answers)
    assert any("too many" in str(answer) for answer in answers)


# Over HTTP


async def bought_over_http(api: str, **terms: Any) -> tuple[Answer, dict[str, str]]:
    """A purchase of an item of its own, and the headers and body that made it."""
    sku = f"cancel-{uuid4().hex[:12]}"
    values = {"name": "Tee", "stock": 5, "price": 100, "currency": "EUR", **terms}
    assert (await call("PUT", f"{api}/v1/items/{sku}", ADMIN, values)).status == 201
    headers = SHOP | {"Idempotency-Key": uuid4().hex}
    body = {"item": sku, "quantity": 1, "customer": "c", "payment_token": "tok_visa"}
    bought = await call("POST", f"{api}/v1/purchases", headers, body)
    assert bought.status == 202, bought.text
    repeated = await call("POST", f"{api}/v1/purchases", headers, body)
    assert repeated.json["id"] == bought.json["id"]
    return bought, headers


async def test_a_delete_answers_with_the_cancelled_purchase(api: str) -> None:
    bought, headers = await bought_over_http(api)
    url = f"{api}{bought.headers['Location']}"

    cancelled = await call("DELETE", url, SHOP)

    assert cancelled.status == 200
    assert (cancelled.json["status"], cancelled.json["reason"]) == ("cancelled", "cancelled_by_client")
    assert (cancelled.json["position"], cancelled.json["decided_at"]) == (None, None)
    assert cancelled.json["finished_at"] > cancelled.json["accepted_at"]
    assert "Retry-After" not in cancelled.headers
    shown = await call("GET", url, SHOP)
    assert (shown.status, shown.json, shown.headers["ETag"]) == (200, cancelled.json, cancelled.headers["ETag"])
    again = await call("DELETE", url, SHOP)
    assert (again.status, again.json, again.headers["ETag"]) == (200, cancelled.json, cancelled.headers["ETag"])
    body = {"item": bought.json["item"], "quantity": 1, "customer": "c", "payment_token": "tok_visa"}
    replayed = await call("POST", f"{api}/v1/purchases", headers, body)
    assert (replayed.status, replayed.json) == (200, cancelled.json)
    assert replayed.headers["Idempotent-Replayed"] == "true"


async def test_a_delete_that_comes_too_late_is_told_so(api: str, api_environment: dict[str, str]) -> None:
    bought, _ = await bought_over_http(api)
    with psycopg.connect(api_environment["FAIRLANE_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "UPDATE fairlane.purchases SET status = 'sold_out', decided_at = now(), finished_at = now(),"
            " payment_token = NULL WHERE id = %s",
            [bought.json["id"]],
        )
    refused = await call("DELETE", f"{api}{bought.headers['Location']}", SHOP)
    assert_problem(refused, 409, "too-late")
    assert refused.json["detail"] == "The purchase is sold_out."


async def test_a_delete_of_what_is_not_ones_own_finds_nothing(api: str) -> None:
    bought, _ = await bought_over_http(api)
    url = f"{api}{bought.headers['Location']}"
    others = await call("DELETE", url, OTHER)
    assert_problem(others, 404, "unknown-purchase")
    assert_problem(await call("DELETE", url, ADMIN), 404, "unknown-purchase")
    nobodys = await call("DELETE", f"{api}/v1/purchases/{uuid4().hex}", OTHER)
    assert nobodys.text == others.text
    for odd in ("1", "x" * 32, bought.json["id"].upper() + "0", "%00" * 32):
        assert_problem(await call("DELETE", f"{api}/v1/purchases/{odd}", SHOP), 404, "unknown-purchase")
    assert_problem(await call("DELETE", url), 401, "unauthorized")
    assert (await call("GET", url, SHOP)).json["status"] == "queued"


async def test_a_delete_that_cannot_get_its_lock_is_to_come_again(api: str, api_environment: dict[str, str]) -> None:
    bought, _ = await bought_over_http(api)
    url = f"{api}{bought.headers['Location']}"
    with psycopg.connect(api_environment["FAIRLANE_DATABASE_URL"]) as somebody:
        somebody.execute(KEPT_PURCHASE, [bought.json["id"]])
        refused = await call("DELETE", url, SHOP)
        assert_problem(refused, 503, "unavailable")
        assert refused.headers["Retry-After"] == "1"
    assert (await call("DELETE", url, SHOP)).status == 200


async def test_no_payment_token_is_left_behind(api: str, api_environment: dict[str, str]) -> None:
    bought, _ = await bought_over_http(api)
    cancelled = await call("DELETE", f"{api}{bought.headers['Location']}", SHOP)
    assert "tok_visa" not in cancelled.text
    with Redis.from_url(api_environment["FAIRLANE_REDIS_URL"], decode_responses=True) as client:
        assert "tok_visa" not in str(client.get(keys.purchase(bought.json["id"])))
